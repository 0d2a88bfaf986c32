"""What `make release` does, from the working tree, quickly."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import kvtc_vllm

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_sdist_and_wheel_are_built_and_work_without_the_source_tree(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.release", "--quick", "--out", str(tmp_path / "dist")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "the wheel works without the source tree"
    assert {path.suffix for path in (tmp_path / "dist").iterdir()} == {".gz", ".whl"}


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == kvtc_vllm.__version__
    assert citation["license"] == "Apache-2.0"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_links_and_targets_of_the_pages_at_the_root_exist(name: str) -> None:
    page = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", page):
        assert f"\n{target}:" in makefile
