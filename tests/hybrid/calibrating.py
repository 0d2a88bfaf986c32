"""A tiny model of a family, calibrated by the command that users type."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from kvtc_vllm.cli import main
from tests.hybrid.families import make_model

BASES = {"kvtc": (), "kvtc2": ("--codec", "kvtc2", "--kv-basis", "shared")}
"""Codec -> options of an artifact for it. That of codec 2 has one basis for K and V."""


def calibrate(
    family: str, reference_model: Path, directory: Path, ratio: float, engine: str, basis: str
) -> tuple[Path, Path]:
    """Model and registry, both in `directory`. engine: JSON of --engine. basis: one of `BASES`."""
    model = make_model(family, directory / "model", vocabulary=2048)
    for path in reference_model.glob("tokenizer*"):
        shutil.copy(path, model)
    sys.path.insert(0, str(reference_model.parent))
    import data

    text = directory / "text.txt"
    text.write_text("\n\n".join(data.texts("train", "mix", characters=40_000)))
    out = directory / "registry"
    arguments = ["calibrate", str(model), "--data", str(text), "--out", str(out)]
    arguments += ["--tokens", "3000", "--max-len", "900", "--ratios", f"{ratio:g}"]
    assert main([*arguments, *BASES[basis], "--engine", engine]) == 0
    return model, out
