"""Artifacts fitted in other ways than `kvtc calibrate` does, for the ablations.

One capture serves many fits. Rank files are written without a card and without
acceptance: an ablation measures what a bad fit does.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from kvtc_vllm.artifact.rank_file import write_rank_file
from kvtc_vllm.artifact.replacing import replacing
from kvtc_vllm.calibration.capture import CaptureSettings, capture_rows
from kvtc_vllm.calibration.fit import fit_rank
from kvtc_vllm.calibration.fit_settings import FitSettings
from kvtc_vllm.calibration.shards import layer_groups
from kvtc_vllm.calibration.spool import SpoolReader

SINKS = 4
_READ_BYTES = 1 << 20
"""Of every file of a spool."""


def capture(
    model: str, data: Sequence[str], tokens: int, engine: dict[str, Any], spool: Path
) -> Path:
    """Sample rows of `data` into a spool; returns rank 0's. vLLM runs in a child process.

    A spool is there as a whole or not at all. Raises RuntimeError if the child fails.
    """
    settings = CaptureSettings(
        model=model, data=tuple(data), tokens=tokens, sink_tokens=SINKS, engine=engine
    )
    unfinished = spool.with_name(f"{spool.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    child = multiprocessing.get_context("spawn").Process(
        target=capture_rows, args=(settings, unfinished)
    )
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"the capture of {', '.join(data)} ended with {child.exitcode}")
    unfinished.replace(spool)
    return spool / "rank0"


def refit(
    spool: Path,
    directory: Path,
    ratios: Sequence[float],
    *,
    layers_per_group: int | None = None,
    rows: int | None = None,
    rope_kept: bool = False,
) -> Path:
    """Fit rank 0 of a spool with something changed; returns the rank file, in `directory`.

    layers_per_group: None = all. rows: training rows to use, None = all. rope_kept:
    treat keys as if they were not rotated. A file that is there already is not made again: its
    name says all of this.
    """
    reader = SpoolReader(spool)
    parts = [
        _contents(spool),
        "all" if layers_per_group is None else f"{layers_per_group}-layers",
        "all" if rows is None else f"{rows}-rows",
        "rope-kept" if rope_kept else "rope-undone",
        *(f"{ratio:g}x" for ratio in sorted(ratios)),
    ]
    out = directory / f"{'_'.join(parts)}.safetensors"
    if out.exists():
        return out
    layers = reader.geometry.num_layers
    groups = layer_groups(layers, layers_per_group)
    reader.geometry = replace(reader.geometry, layer_groups=groups)
    if rope_kept:
        reader.layer_rope = (None,) * layers
    fit = fit_rank(
        reader,
        reader.geometry,
        reader.ropes,
        reader.layer_rope,
        ratios,
        sink_tokens=SINKS,
        settings=FitSettings(train_rows=rows),
    )
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(out) as unfinished:
        write_rank_file(unfinished, fit.artifact, reader.probe(), 0, 1)
    return out


def _contents(spool: Path) -> str:
    """Tells spools apart: by their header, which tokens they hold, and their first rows."""
    digest = xxhash.xxh3_64()
    for name in ("header.json", "docs.bin", "positions.bin", "k.bin", "v.bin"):
        with (spool / name).open("rb") as file:
            digest.update(file.read(_READ_BYTES))
    return digest.hexdigest()
