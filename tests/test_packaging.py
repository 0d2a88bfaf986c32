"""What a user installs: the wheel's content, its metadata, and the commands README promises."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import kvtc_vllm

ROOT = Path(__file__).resolve().parent.parent


def data_files(folder: str) -> set[str]:
    """Committed files under a data directory, relative to it."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return {name.removeprefix(f"{folder}/") for name in listing.stdout.split("\0") if name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the working tree with what the environment has."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    result = subprocess.run([*build, str(ROOT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def content(wheel: Path) -> dict[str, bytes]:
    """Every file of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def dist_info(content: dict[str, bytes]) -> str:
    """Name of the wheel's metadata folder."""
    (name,) = {n.split("/")[0] for n in content if n.split("/")[0].endswith(".dist-info")}
    return name


def test_entry_points(content: dict[str, bytes], dist_info: str) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(content[f"{dist_info}/entry_points.txt"].decode())
    assert dict(parser["vllm.general_plugins"]) == {"kvtc": "kvtc_vllm.connector:register"}
    assert dict(parser["console_scripts"]) == {"kvtc": "kvtc_vllm.cli:main"}


def test_metadata(content: dict[str, bytes], dist_info: str) -> None:
    metadata = Parser().parsestr(content[f"{dist_info}/METADATA"].decode())
    assert metadata["Name"] == "kvtc-vllm"
    assert metadata["Version"] == kvtc_vllm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata["Requires-Python"].split(",")) == {">=3.11", "<3.14"}
    required = metadata.get_all("Requires-Dist")
    assert required is not None
    assert "torch" in required, "torch must have no version: vLLM pins it"
    serving = {"vllm", "lmcache", "cu12", "cu13"}
    others = {"bench", "calibrate", "eval", "docs", "deploy", "dev"}
    assert serving | others == set(metadata.get_all("Provides-Extra") or ())


def test_only_the_package_is_at_the_top(content: dict[str, bytes], dist_info: str) -> None:
    assert {name.split("/")[0] for name in content} == {"kvtc_vllm", dist_info}


def test_typed_marker_and_licence(content: dict[str, bytes], dist_info: str) -> None:
    assert "kvtc_vllm/py.typed" in content
    licence = content[f"{dist_info}/licenses/LICENSE"].decode()
    assert "Apache License" in licence
    assert licence == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("folder", "inside"), [("configs", "_configs"), ("calibrations", "_calibrations")]
)
def test_data_directories(content: dict[str, bytes], folder: str, inside: str) -> None:
    expected = data_files(folder)
    assert expected
    packed = {n.removeprefix(f"kvtc_vllm/{inside}/") for n in content if f"/{inside}/" in n}
    assert expected <= packed


def test_presets_are_found_in_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """The installed package must not fall back on the source tree beside it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "from kvtc_vllm import config; print(config.preset_directory());"
        "print(*config.preset_names()); config.load_preset('kvtc-16x')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    directory, names = result.stdout.splitlines()
    assert Path(directory) == tmp_path / "kvtc_vllm" / "_configs"
    # Folders below are for Prometheus and Grafana.
    stems = {Path(n).stem for n in data_files("configs") if n.endswith("yaml") and "/" not in n}
    # LMCache's are presets of its server, not of our connector.
    assert set(names.split()) == {stem for stem in stems if not stem.startswith("lmcache-")}


def test_commands_in_the_readme_exist() -> None:
    # In backticks or at the start of a line of a code block; elsewhere "make" is a verb.
    readme = (ROOT / "README.md").read_text()
    promised = set(re.findall(r"(?:^|`)make ([a-z-]+)", readme, re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"test", "demo"} <= promised
    assert promised <= targets


def test_dependencies_of_vllm_match_the_supported_range(
    content: dict[str, bytes], dist_info: str
) -> None:
    metadata = content[f"{dist_info}/METADATA"].decode()
    assert re.search(
        r"^Requires-Dist: vllm<0\.34,>=0\.26; extra == .vllm.$", metadata, re.MULTILINE
    )


def test_serving_needs_nothing_that_only_calibration_and_evaluation_use(
    content: dict[str, bytes], dist_info: str
) -> None:
    required = Parser().parsestr(content[f"{dist_info}/METADATA"].decode()).get_all("Requires-Dist")
    assert required is not None
    for name in ("matplotlib", "tqdm"):
        extras = {r.split("extra == ")[-1].strip("'") for r in required if r.startswith(name)}
        assert {"calibrate", "eval", "dev"} <= extras <= {"bench", "calibrate", "eval", "dev"}
