"""The demo's artifact: the one shipped for its model, or one calibrated here and kept.

What is calibrated here is found again by a name that holds a hash of the model, the text and the
settings. So it was calibrated on `calibration_text` and nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import xxhash

from benchmarks.demo import calibration_text
from benchmarks.demo.server import ENVIRONMENT, tail
from kvtc_vllm.artifact.card import load_card
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.artifact.registry import Wanted, mismatches, scan, shipped_registry
from kvtc_vllm.calibration.writing import model_slug
from kvtc_vllm.codec.errors import ArtifactError

ROWS = 24_000
"""Of the fit; twice as many tokens are run. At 8x, values that SmolLM2's fit has not seen err 1.5
times as much as predicted, near what acceptance allows; so fewer rows are not advisable."""
MAX_LEN = 4096
TEXT = "standard-library-docstrings.jsonl"
APART = {TEXT, "smollm2-texts.jsonl"}
"""Texts without the pages of the demo: `calibration_text`, and `benchmarks.calibration_texts`."""
_CHARACTERS = 4 * 2 * ROWS
"""A token of this text has some 3.8 characters; what is left over is not run."""


def find_or_calibrate(
    model: Path,
    codec: str,
    ratios: Sequence[float],
    dtype: str,
    registry: Path | None,
    log: Path,
    *,
    shipped: bool = True,
) -> Path:
    """Directory of the demo's artifact, made by `kvtc calibrate` if there is none.

    model: directory that vLLM serves. codec, ratios: whose artifact, with plans for which target
    ratios. dtype: in which a calibration runs the model. registry: keeps what is made. log: file
    for what a calibration says. shipped: take the artifact that comes with this package, if it has
    one of this model. Raises RuntimeError with the end of the log if a calibration fails,
    ValueError if one is needed and there is no registry.
    """
    if shipped and (found := _shipped(model, codec, ratios)):
        print(f"artifact: {found.parent.name}/{found.name}, shipped", flush=True)
        return found
    if registry is None:
        raise ValueError(
            "XDG_DATA_HOME: set it, the artifact is kept there for a user without home"
        )
    with tempfile.TemporaryDirectory(prefix="kvtc-demo-") as directory:
        text = Path(directory) / TEXT
        calibration_text.write(text, _CHARACTERS)
        name = _name(model, codec, ratios, dtype, text)
        made = registry / model_slug(model.name) / name
        if _usable(made):
            print(f"artifact: {made} of an earlier run", flush=True)
            return made
        started = time.monotonic()
        print(
            f"artifact: calibrating on {ROWS} rows of docstrings of the standard library ...",
            flush=True,
        )
        _calibrate(_command(model, codec, ratios, dtype, text, registry, name), log)
        print(f"artifact: {made}, {time.monotonic() - started:.0f} s", flush=True)
    return made


def describe(artifact: Path) -> str:
    """On what text it was calibrated, and that it is not what the demo asks about."""
    card = load_card(artifact)
    files = ", ".join(card.data.files)
    line = f"calibrated on {card.data.train_tokens:,} rows of {files}"
    if set(card.data.files) <= APART:
        line += (
            "; the conversations are about pages of Python's language reference, on which nothing "
            "was calibrated or tuned"
        )
    return line


def _shipped(model: Path, codec: str, ratios: Sequence[float]) -> Path | None:
    identity = model_identity(str(model))
    for directory, card in scan(shipped_registry()):
        wanted = (Wanted(identity, 1, ratio, model.name, codec) for ratio in ratios)
        if not any(mismatches(card, each) for each in wanted):
            return directory
    return None


def _usable(directory: Path) -> bool:
    try:
        load_card(directory)
    except ArtifactError:
        return False
    return True


def _name(model: Path, codec: str, ratios: Sequence[float], dtype: str, text: Path) -> str:
    settings = [codec, list(ratios), dtype, ROWS, MAX_LEN]
    of = [model_identity(str(model)).identity, settings, text.read_text()]
    return f"demo-{xxhash.xxh3_64_hexdigest(json.dumps(of).encode())}"


def _command(
    model: Path,
    codec: str,
    ratios: Sequence[float],
    dtype: str,
    text: Path,
    registry: Path,
    name: str,
) -> list[str]:
    # The cache holds one document; the rest of the machine's memory is for the fit.
    engine = {"max_model_len": MAX_LEN, "dtype": dtype, "gpu_memory_utilization": 0.3}
    return [
        *(sys.executable, "-m", "kvtc_vllm.cli", "calibrate", str(model)),
        *("--data", str(text), "--tokens", str(ROWS), "--max-len", str(MAX_LEN)),
        *("--codec", codec, "--ratios", ",".join(f"{ratio:g}" for ratio in ratios)),
        *("--out", str(registry), "--name", name, "--model-name", model.name),
        *("--engine", json.dumps(engine)),
    ]


def _calibrate(command: list[str], log: Path) -> None:
    with log.open("wb") as output:
        status = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT}
        ).returncode
    if status:
        raise RuntimeError(f"kvtc calibrate ended with status {status}; {tail(log)}")
