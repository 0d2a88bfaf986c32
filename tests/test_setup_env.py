"""The parts of setup_env.py that need no network; `make setup` itself is run by every CI run."""

from __future__ import annotations

import importlib.metadata
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
