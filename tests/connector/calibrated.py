"""Artifacts of codec 2 of the reference model, made by `kvtc calibrate` as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SMALL_ENGINE = {
    "block_size": 32,
    "num_gpu_blocks_override": 100,
    "gpu_memory_utilization": 0.3,
}


def calibrate(
    model: Path, directory: Path, characters: int, max_len: int, options: Mapping[str, str]
) -> None:
    """Calibrate on so many characters of the reference data, in documents of `max_len` tokens.

    directory: where the artifact goes, as in a registry. options: further ones of the command.
    """
    sys.path.insert(0, str(model.parent))
    import data

    text = directory / "documents.jsonl"
    found = data.texts("train", "mix", characters)
    text.write_text("".join(json.dumps({"text": part}) + "\n" for part in found))
    steps = (max_len // 64 + 1) * 64
    given = {
        "--codec": "kvtc2",
        "--data": str(text),
        "--tokens": "8000",
        "--max-len": str(max_len),
        "--simulation-rows": "512",
        "--out": str(directory),
        "--engine": json.dumps(
            SMALL_ENGINE | {"max_model_len": steps, "max_num_batched_tokens": steps}
        ),
        **options,
    }
    command = [sys.executable, "-m", "kvtc_vllm.cli", "calibrate", str(model)]
    parts = [part for pair in given.items() for part in pair if part]
    subprocess.run([*command, *parts], check=True)
