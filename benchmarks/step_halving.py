"""How fast chunks are halved, against encoding and decoding them, on one thread.

    python -m benchmarks.step_halving --artifact DIR --spool DIR [--rounds 5]
                                      [--out benchmarks/results/step_halving.json]

The artifact is of codec 2. Its plan of --ratio gets two plans nested in it, fitted to training rows
of the spool, as `kvtc fit --halvings 2` makes them. The chunk is the artifact's probe, rows that no
fit has seen. All ways take turns in every round; figures are medians of CPU seconds per chunk.
*resident_mb* is what the codec's matrices take with the one ratio, and with all three.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.codec_rows import ROOT, probe_rows
from benchmarks.step_layers import nested_plans, training_coefficients
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.cpu.requantise import Requantiser
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.v2.codec import ENTROPY, Kvtc2Codec
from kvtc_vllm.codec.v2.plan import step_plan

TIMES = 2


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.step_halving", description=__doc__)
    parser.add_argument("--artifact", type=Path, required=True, help="of codec kvtc2")
    parser.add_argument("--spool", type=Path, required=True, help="that it was fitted to")
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/step_halving.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = probe_rows(args.artifact, 128)
    artifact = with_nested(rows.artifact, args.spool, args.ratio)
    codec = open_codec("kvtc2", rows.k.dtype, artifact=artifact, ratio=args.ratio)
    assert isinstance(codec, Kvtc2Codec)
    halver = Requantiser(codec, ENTROPY)
    resident = [codec.resident_bytes]
    blobs = [codec.encode(rows.k, rows.v, rows.start)]
    for _ in range(TIMES):
        blobs.append(halver.halve(blobs[-1]))
    ways: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.encode(rows.k, rows.v, rows.start),
        "decode": lambda: codec.decode(blobs[0]),
        "halve": lambda: halver.halve(blobs[0]),
        "halve again": lambda: halver.halve(blobs[1]),
        "decode, halved": lambda: codec.decode(blobs[1]),
        "decode, halved twice": lambda: codec.decode(blobs[2]),
    }
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            started = time.process_time()
            way()
            seconds[name].append(time.process_time() - started)
    resident.append(codec.resident_bytes)
    found = {name: statistics.median(taken) for name, taken in seconds.items()}
    result = {
        "command": "python -m benchmarks.step_halving --artifact DIR --spool DIR "
        f"--ratio {args.ratio:g} --rounds {args.rounds}",
        "rows_of": rows.source,
        "tokens": rows.tokens,
        "resident_mb": [round(taken / 1e6, 1) for taken in resident],
        "bytes": [len(blob) for blob in blobs],
        "milliseconds": {name: round(1e3 * taken, 2) for name, taken in found.items()},
        "of_encoding": {name: round(taken / found["encode"], 3) for name, taken in found.items()},
        "machine": f"{platform.machine()}, 1 core used",
    }
    print(json.dumps(result, indent=1))
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def with_nested(artifact: RankArtifact, spool: Path, ratio: float) -> RankArtifact:
    """With plans nested in those of one ratio, called by twice and four times the ratio, alone."""
    training, marks = training_coefficients(spool, artifact)
    plans = {key: step_plan(section, ratio) for key, section in artifact.sections.items()}
    sections = {
        key: replace(section, plans={ratio: plans[key]}, heldout_error={})
        for key, section in artifact.sections.items()
    }
    for times in range(1, TIMES + 1):
        lower = nested_plans(training, marks, plans)
        for key, plan in lower.items():
            # Bounds need some: these are above what they take.
            beyond = None
            if plan.beyond is not None:
                beyond = replace(plan.beyond, token_bytes=plans[key].token_bytes)
            lower[key] = replace(plan, token_bytes=plans[key].token_bytes, beyond=beyond)
            own = {**sections[key].plans, ratio * 2**times: lower[key]}
            sections[key] = replace(sections[key], plans=own)
        plans = lower
    return replace(artifact, sections=sections)


if __name__ == "__main__":
    main()
