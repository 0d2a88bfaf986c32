"""Encode and decode speed of the codec on one CPU core: the reference and the fast way, paired.

    python -m benchmarks.codec [--artifact DIR | --power-law] [--rows N] [--stages]
                               [--out benchmarks/results/codec.json]

Rows are the probe of an artifact: real KV of held-out text; by default the reference model's. MB/s
are of uncompressed KV, 10^6 bytes, per second of CPU time. Every codec takes its turn in every
round, so a busy machine slows all alike; speeds are medians, speed-ups medians of the rounds' own
ratios. Ways: the reference; fast; fast-batch, several chunks in one call; fast-float32, compiled
loops with products of float32, which is what runs where int8 is not fast.

`--stages` shows where the time goes, in microseconds per token, with `--other` of its codec too.

`--other DIR` times another artifact of the same model on the same rows in the same rounds, such as
one of kvtc2. Its speed over the fast way's is then given at equal real ratio: its times are read
off, between its own ratios, where its blobs are as large as those of the fast way; chunk by chunk,
and in batches against batches. resident_mb: what bases and matrices take, 10^6 bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.codec_rows import ROOT, Rows, power_law_rows, probe_rows
from benchmarks.codec_stages import stages
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.codec.artifact import KINDS, RankArtifact
from kvtc_vllm.codec.base import ChunkCodec, NewChunk, StoredChunk
from kvtc_vllm.codec.cpu.codec import CpuCodec
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.transform import chunk_rows

ROUNDS = 15
OTHER = "other"
"""The way of the codecs of another artifact."""
IN_BATCHES = "-batch"
"""Ends the ways of several chunks in one call."""
BATCH = 4
"""Chunks in one call of the way "fast-batch", as in a request."""


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.codec", description=__doc__)
    parser.add_argument("--artifact", type=Path, help="directory of an artifact")
    parser.add_argument("--power-law", action="store_true", help="made-up rows, 5760 features")
    parser.add_argument("--rows", type=int, default=128, help="tokens per chunk")
    parser.add_argument("--ratios", default="", help="target ratios, as 8,16; default all")
    parser.add_argument("--stages", action="store_true", help="time the parts of the codec")
    parser.add_argument("--other", type=Path, help="directory of an artifact to compare with")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/codec.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = tuple(float(ratio) for ratio in args.ratios.split(",") if ratio)
    if args.power_law:
        rows = power_law_rows(args.rows, wanted or (8.0, 16.0, 32.0))
    else:
        rows = probe_rows(args.artifact, args.rows)
    ratios = wanted or rows.artifact.ratios()
    other = None if args.other is None else load_rank_artifact(args.other, 0)[0]
    result: dict[str, Any] = {
        "command": " ".join(
            [
                "python -m benchmarks.codec",
                *(["--artifact DIR"] if args.artifact else []),
                *(["--power-law"] if args.power_law else []),
                *(["--other DIR"] if args.other else []),
                *(["--stages"] if args.stages else []),
                *([f"--ratios {args.ratios}"] if args.ratios else []),
            ]
        ),
        "rows_of": rows.source,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 used",
        "versions": {p: version(p) for p in ("kvtc-vllm", "torch", "numba", "isal")},
        "chunk_tokens": rows.tokens,
        "row_size": rows.artifact.geometry.row_size(0, "k"),
        "unit": "microseconds per token" if args.stages else "MB/s",
        "rows": (stages if args.stages else measure)(rows, ratios, other),
    }
    for row in result["rows"]:
        print(*(f"{name} {value}" for name, value in row.items()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


Key = tuple[str, str]
"""Name and way of a codec."""


def codecs_of(
    rows: Rows, ratios: tuple[float, ...], other: RankArtifact | None
) -> dict[Key, ChunkCodec]:
    """Those to be compared, in the order of the table."""
    artifact, dtype = rows.artifact, rows.k.dtype
    codecs: dict[Key, ChunkCodec] = {("raw", ""): RawCodec(artifact.geometry, dtype)}
    for ratio in ratios:
        name = f"{artifact.codec}-{ratio:g}x"
        opened = partial(open_codec, artifact.codec, dtype, artifact=artifact, ratio=ratio)
        fast = opened()
        assert isinstance(fast, CpuCodec)
        codecs[name, "reference"] = opened(fast=False)
        codecs[name, "fast"] = codecs[name, "fast-batch"] = fast
        codecs[name, "fast-float32"] = type(fast)(artifact, ratio, dtype, int8=False)
    if other is not None:
        for ratio in other.ratios():
            codec = open_codec(other.codec, dtype, artifact=other, ratio=ratio)
            codecs[f"{other.codec}-{ratio:g}x", OTHER] = codec
            codecs[f"{other.codec}-{ratio:g}x", OTHER + IN_BATCHES] = codec
    return codecs


def measure(
    rows: Rows, ratios: tuple[float, ...], other: RankArtifact | None = None
) -> list[dict[str, float | str]]:
    """Median speeds, speed-ups over the reference, errors and sizes."""
    codecs = codecs_of(rows, ratios, other)
    blobs = {key: codec.encode(rows.k, rows.v, rows.start) for key, codec in codecs.items()}
    new = [NewChunk(rows.k, rows.v, rows.start)] * BATCH
    encode: dict[Key, list[float]] = {key: [] for key in codecs}
    decode: dict[Key, list[float]] = {key: [] for key in codecs}
    for _ in range(ROUNDS):
        for key, codec in codecs.items():
            if key[1].endswith(IN_BATCHES):
                stored = [StoredChunk(blobs[key])] * BATCH
                encode[key].append(seconds(partial(codec.encode_many, new)) / BATCH)
                decode[key].append(seconds(partial(codec.decode_many, stored)) / BATCH)
            else:
                encode[key].append(seconds(partial(codec.encode, rows.k, rows.v, rows.start)))
                decode[key].append(seconds(partial(codec.decode, blobs[key])))
    found = [_row(key, codec, blobs[key], rows) for key, codec in codecs.items()]
    for row, key in zip(found, codecs, strict=True):
        row["encode_mb_s"] = round(rows.nbytes / 1e6 / statistics.median(encode[key]), 1)
        row["decode_mb_s"] = round(rows.nbytes / 1e6 / statistics.median(decode[key]), 1)
        if key[1].startswith("fast"):
            base = key[0], "reference"
            row["encode_speed_up"] = paired(encode[base], encode[key])
            row["decode_speed_up"] = paired(decode[base], decode[key])
    add_cost_in_bytes(found)
    add_speed_at_equal_ratio(found)
    return found


def add_speed_at_equal_ratio(rows: list[dict[str, float | str]]) -> None:
    """The other artifact's speeds over those of each fast row, at that row's real ratio.

    Batches are compared with batches.
    """
    for row in rows:
        way = str(row["way"]).replace("fast", OTHER)
        others = sorted((r for r in rows if r["way"] == way), key=lambda r: float(r["real_ratio"]))
        sizes = [math.log(float(r["real_ratio"])) for r in others]
        size = math.log(float(row["real_ratio"]))
        if way == row["way"] or not sizes or not sizes[0] <= size <= sizes[-1]:
            continue
        for name in ("encode", "decode"):
            speeds = [math.log(float(r[f"{name}_mb_s"])) for r in others]
            there = math.exp(float(np.interp(size, sizes, speeds)))
            row[f"{name}_of_other"] = round(there / float(row[f"{name}_mb_s"]), 2)


def _row(key: Key, codec: ChunkCodec, blob: bytes, rows: Rows) -> dict[str, float | str]:
    """What is not a speed."""
    row: dict[str, float | str] = {
        "codec": key[0],
        "way": key[1],
        "real_ratio": round(rows.nbytes / len(blob), 3),
    }
    if isinstance(codec, CpuCodec):
        row["products"] = codec.arithmetic.partition(" of ")[2]
        row["resident_mb"] = round(codec.resident_bytes / 1e6, 1)
    if key[1]:
        row.update(errors(codec, blob, rows))
    return row


def paired(base: list[float], other: list[float]) -> float:
    """Median ratio of two codecs' times in the same rounds."""
    return round(statistics.median(a / b for a, b in zip(base, other, strict=True)), 2)


def errors(codec: ChunkCodec, blob: bytes, rows: Rows) -> dict[str, float]:
    """Relative squared error of K without rotation and of V, over deviation from the mean."""
    decoded = codec.decode(blob)
    positions = torch.arange(rows.start, rows.start + rows.tokens)
    found: dict[str, float] = {}
    for kind in KINDS:
        wrong = total = 0.0
        for group in range(len(rows.artifact.geometry.layer_groups)):
            x, y = (
                chunk_rows(k, v, group, kind, rows.artifact, positions).double()
                for k, v in ((rows.k, rows.v), (decoded.k, decoded.v))
            )
            wrong += float((x - y).square().sum())
            total += float((x - rows.mean(group, kind)).square().sum())
        found[f"error_{kind}"] = round(wrong / total, 6)
    return found


def add_cost_in_bytes(rows: list[dict[str, float | str]]) -> None:
    """What a way's error beyond the reference's would cost in bytes, in per cent.

    As many as the reference would save by making the same error, read off between its own ratios.
    """
    reference = [row for row in rows if row.get("way") == "reference"]
    for row in rows:
        if not str(row["way"]).startswith("fast") or len(reference) < 2:
            continue
        place = next(i for i, r in enumerate(reference) if r["codec"] == row["codec"])
        other = reference[place + 1] if place + 1 < len(reference) else reference[place - 1]
        base = reference[place]
        size = math.log(float(other["real_ratio"]) / float(base["real_ratio"]))
        costs = []
        for kind in ("error_k", "error_v"):
            slope = math.log(float(other[kind]) / float(base[kind])) / size
            costs.append(math.log(float(row[kind]) / float(base[kind])) / slope)
        row["bytes_at_equal_error_percent"] = round(100 * statistics.mean(costs), 2)


def seconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    started = time.process_time()
    call()
    return time.process_time() - started


if __name__ == "__main__":
    main()
