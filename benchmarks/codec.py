"""Encode and decode speed of the CPU reference codec, on one core, against the raw row.

    python -m benchmarks.codec [--out benchmarks/results/codec.json]

Rows are the probe of the reference model's artifact: real KV of held-out text. MB/s
are of uncompressed KV, 10^6 bytes; medians of interleaved rounds, so that a busy
machine slows all rows alike.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.artifact.registry import find
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.raw import RawCodec

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests" / "reference_model" / "model"
ROUNDS = 15


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.codec", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/codec.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    directory = find(model_identity(MODEL), 1, 16.0, model_name=str(MODEL))
    artifact, _, probe = load_rank_artifact(directory, 0)
    k, v = probe.k.to(torch.bfloat16), probe.v.to(torch.bfloat16)
    start = k.shape[0]
    codecs: dict[str, ChunkCodec] = {"raw": RawCodec(artifact.geometry, torch.bfloat16)}
    for ratio in artifact.ratios():
        codecs[f"kvtc-{ratio:g}x"] = KvtcCodec(artifact, ratio, torch.bfloat16)
    rows = measure(codecs, k, v, start)
    print(f"{'codec':10} {'ratio':>6} {'encode MB/s':>12} {'decode MB/s':>12}")
    for row in rows:
        print(
            f"{row['codec']:10} {row['real_ratio']:6.1f} {row['encode_mb_s']:12.0f} "
            f"{row['decode_mb_s']:12.0f}"
        )
    result = {
        "command": "python -m benchmarks.codec",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 used",
        "versions": {p: version(p) for p in ("kvtc-vllm", "torch", "isal")},
        "chunk_tokens": k.shape[0],
        "row_size": artifact.geometry.row_size(0, "k"),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(
    codecs: dict[str, ChunkCodec], k: torch.Tensor, v: torch.Tensor, start: int
) -> list[dict[str, float | str]]:
    """Median speeds; every codec takes its turn in every round."""
    raw = k.nbytes + v.nbytes
    encode: dict[str, list[float]] = {name: [] for name in codecs}
    decode: dict[str, list[float]] = {name: [] for name in codecs}
    blobs = {name: codec.encode(k, v, start) for name, codec in codecs.items()}
    for _ in range(ROUNDS):
        for name, codec in codecs.items():
            encode[name].append(_seconds(functools.partial(codec.encode, k, v, start)))
            decode[name].append(_seconds(functools.partial(codec.decode, blobs[name])))
    return [
        {
            "codec": name,
            "real_ratio": round(raw / len(blobs[name]), 3),
            "encode_mb_s": round(raw / 1e6 / statistics.median(encode[name]), 1),
            "decode_mb_s": round(raw / 1e6 / statistics.median(decode[name]), 1),
        }
        for name in codecs
    ]


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
