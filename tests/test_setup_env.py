"""The parts of setup_env.py that need no network; `make setup` itself is run by every CI run."""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
from pathlib import Path

import pytest

from tests import setup_env


@pytest.fixture
def site_packages(tmp_path: Path) -> Path:
    """A folder with one package that pip finished."""
    finished = tmp_path / "good-1.0.dist-info"
    finished.mkdir()
    for name in ("METADATA", "INSTALLER", "RECORD"):
        (finished / name).write_text("")
    (tmp_path / "good").mkdir()
    return tmp_path


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_leftovers_of_an_interrupted_pip_are_removed(site_packages: Path) -> None:
    before = names(site_packages)
    (site_packages / "~umpy").mkdir()
    (site_packages / "~stale.pth").write_text("")
    half = site_packages / "half-2.0.dist-info"
    half.mkdir()
    (half / "METADATA").write_text("Name: half")
    (half / "RECORD").write_text("")
    removed = setup_env.remove_leftovers(site_packages)
    assert removed == ["half-2.0.dist-info", "~stale.pth", "~umpy"]
    assert names(site_packages) == before


def test_stub_gives_vllm_a_cpu_version(site_packages: Path) -> None:
    setup_env.write_stub(site_packages, "0.27.0")
    setup_env.write_stub(site_packages, "0.32.0")
    setup_env.write_stub(site_packages, "0.32.0")
    (stub,) = importlib.metadata.distributions(name="vllm", path=[str(site_packages)])
    assert stub.version == "0.32.0+cpu"
    assert len(list(site_packages.glob("vllm-*"))) == 1


def test_stub_does_not_replace_a_real_vllm(site_packages: Path) -> None:
    real = site_packages / "vllm-0.33.0.dist-info"
    real.mkdir()
    (real / "INSTALLER").write_text("pip\n")
    with pytest.raises(setup_env.SetupError, match="real vLLM"):
        setup_env.write_stub(site_packages, "0.32.0")
    assert names(real) == {"INSTALLER"}


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(setup_env.SetupError, match="not a virtual environment"):
        setup_env.create(setup_env.Environment(tmp_path, "0.32.0"))
    assert names(tmp_path) == {"thesis.tex"}


def test_stamp_belongs_to_one_version(tmp_path: Path) -> None:
    env = setup_env.Environment(tmp_path, "0.32.0")
    (tmp_path / "bin").mkdir()
    env.python.symlink_to(sys.executable)
    assert not env.is_stamped()
    env.stamp.write_text(env.fingerprint() + "\n")
    assert env.is_stamped()
    assert not setup_env.Environment(tmp_path, "0.27.0").is_stamped()


def test_check_of_a_missing_environment_fails_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "none"
    assert setup_env.main(["--venv", str(target), "--check"]) == 1
    assert "missing, unfinished or out of date" in capsys.readouterr().err
    assert not target.exists()


CONFIGURED = """\
:env:.disable-pip-version-check='1'
:env:.find-links='/wheels'
global.cert='/certificates.crt'
global.constraint='/one.txt /two.txt'
global.extra-index-url='file:///a/simple file:///b/simple'
global.find-links='/others'
list.format='columns'
"""


def test_uv_is_told_what_pip_is_configured_with() -> None:
    options, variables = setup_env.uv_settings(CONFIGURED)
    pairs = list(itertools.pairwise(options))
    assert {value for name, value in pairs if name == "--constraint"} == {"/one.txt", "/two.txt"}
    indexes = [value for name, value in pairs if name == "--index"]
    assert indexes == ["file:///a/simple", "file:///b/simple"]
    # As pip has it, a variable takes the place of what files say.
    assert [value for name, value in pairs if name == "--find-links"] == ["/wheels"]
    assert variables == {"SSL_CERT_FILE": "/certificates.crt"}
    # Best of all indexes, as pip; uv by itself takes the first that has a package.
    assert ("--index-strategy", "unsafe-best-match") in pairs


@pytest.mark.parametrize(
    "line", ["global.no-binary=':all:'", "install.prefer-binary='1'", ":env:.proxy='p'", "a\nb"]
)
def test_what_uv_has_no_word_for_is_left_to_pip(line: str) -> None:
    with pytest.raises(setup_env.SetupError, match="can't be told"):
        setup_env.uv_settings(CONFIGURED + line)


class Recorded(setup_env.Environment):
    """Commands are noted; uv's fail."""

    def __init__(self, path: Path, settings: str = "") -> None:
        super().__init__(path, "0.32.0")
        self.settings = settings
        self.commands: list[tuple[str, ...]] = []

    def run(self, *arguments: str, stdin: str | None = None, **variables: str) -> str:
        self.commands.append(arguments)
        if arguments[1] == "uv":
            raise setup_env.SetupError("uv is broken")
        return self.settings if "list" in arguments else ""

    def site_packages(self) -> Path:
        return self.path


def test_what_uv_cannot_install_pip_does(tmp_path: Path) -> None:
    env = Recorded(tmp_path)
    env.find_uv()
    assert env.uv is not None
    env.commands.clear()
    env.install("a==1")
    env.install("b==1")
    assert [(command[1], command[-1]) for command in env.commands] == [
        ("uv", "a==1"),
        ("pip", "a==1"),
        ("pip", "b==1"),
    ]


def test_a_setting_unknown_to_uv_means_pip(tmp_path: Path) -> None:
    env = Recorded(tmp_path, "global.only-binary=':all:'")
    env.find_uv()
    env.install("a==1")
    assert [command[1] for command in env.commands] == ["pip", "pip"]
