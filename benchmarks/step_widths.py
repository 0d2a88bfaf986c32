"""How many codes of codec 2 may be escapes: bytes stored, bytes to inflate, and time on a CPU.

    python -m benchmarks.step_widths --spool DIR --work DIR [--layers 10] [--ratios 16,32]
                                     [--out benchmarks/results/step-widths.json]

A class of columns has the narrowest packed codes that no larger share of its codes escapes from
(`step_classes.MOST_ESCAPES`). Shares change neither levels nor error. The layer group, its rows and
its basis are those of `benchmarks.step_products`; the step is the one of the target ratio. *stored*
and *inflated*: bytes per token of blobs of 128 tokens, behind DEFLATE and before it. Times are CPU
time per token of ordinary tokens of a chunk, medians of rounds in which all shares take their turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.codec import seconds
from benchmarks.sensitivity import ROOT
from benchmarks.step_products import Group, Way, read_group, sample_of
from kvtc_vllm.calibration import step_classes
from kvtc_vllm.calibration.step_classes import Sample, StepSettings, make_step_plan
from kvtc_vllm.calibration.step_plans import coded_bytes, make_step_plans
from kvtc_vllm.codec.artifact import SectionBasis
from kvtc_vllm.codec.cpu.step_section import StepSection
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.codec.v2.codes import encode_codes
from kvtc_vllm.codec.v2.plan import StepPlan

CHUNK = 128
ROUNDS = 25
SHARES = ((0.1, 0.03), (0.15, 0.06), (0.2, 0.1), (0.2, 0.2), (0.25, 0.25))
"""Of codes in 2 and in 4 bits; the first are those of artifacts before this was measured."""


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.step_widths", description=__doc__)
    add = parser.add_argument
    add("--spool", type=Path, required=True, help="of kvtc calibrate --sensitivity gradient")
    add("--work", type=Path, required=True, help="directory for bases, which are kept")
    add("--layers", type=int, default=10, help="per layer group")
    add("--rows", type=int, default=24_000, help="to fit bases to, at most")
    add("--ratios", default="16,32", help="target ratios")
    add("--out", type=Path, default=ROOT / "benchmarks/results/step-widths.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    group = read_group(args.spool, args.layers, args.rows)
    sample, _, _ = sample_of(Way(), group, args.work)
    rows = [row for ratio in args.ratios.split(",") for row in measure(float(ratio), group, sample)]
    result = {
        "command": "python -m benchmarks.step_widths --spool DIR --work DIR "
        f"--layers {args.layers} --rows {args.rows} --ratios {args.ratios}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 used",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": {p: version(p) for p in ("kvtc-vllm", "torch", "numba", "isal")},
        "unit": "bytes and microseconds per token",
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(ratio: float, group: Group, sample: Sample) -> list[dict[str, Any]]:
    """A row for each of `SHARES`."""
    steps = StepSettings(sink_gain=group.gain)
    silent = lambda stage, done, total: None  # noqa: E731
    (found,) = make_step_plans(
        [sample], group.marks, [ratio], group.overhead, ENTROPY, steps, silent
    )
    plans = [plan_of(shares, group, sample, found[ratio].step, steps) for shares in SHARES]
    chunk = sample.coefficients[:CHUNK]
    timed = [calls(plan, chunk) for plan in plans]
    times = [[[seconds(call) for call in own.values()] for own in timed] for _ in range(ROUNDS)]
    rows: list[dict[str, Any]] = []
    for i, (shares, plan) in enumerate(zip(SHARES, plans, strict=True)):
        codes = plan.quantise(sample.coefficients)
        row: dict[str, Any] = {
            "target_ratio": ratio,
            "escapes_of_2_bits": shares[0],
            "escapes_of_4_bits": shares[1],
            "columns": {part.width: len(part.columns) for part in plan.packed},
            "stored": round(coded_bytes(plan, sample, group.marks, ENTROPY)[0], 1),
            "inflated": round(
                sum(map(len, encode_codes(codes, plan.packed))) / len(sample.coefficients), 1
            ),
        }
        for j, name in enumerate(timed[i]):
            own = statistics.median(times[k][i][j] for k in range(ROUNDS))
            row[f"{name}_us"] = round(1e6 * own / CHUNK, 2)
        row["inflated_over_first"] = round(row["inflated"] / (rows or [row])[0]["inflated"], 3)
        rows.append(row)
        print(*(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


def plan_of(
    shares: tuple[float, float], group: Group, sample: Sample, step: float, steps: StepSettings
) -> StepPlan:
    """At a step, with other shares of escapes."""
    kept = step_classes.MOST_ESCAPES
    step_classes.MOST_ESCAPES = dict(zip((2, 4), shares, strict=True))
    try:
        return make_step_plan(sample, group.marks, step, steps)
    finally:
        step_classes.MOST_ESCAPES = kept


def calls(plan: StepPlan, coefficients: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The codec's steps after a product and before the next one, by name."""
    plan = replace(plan, beyond=None)
    mean, basis = torch.zeros(plan.rank), torch.eye(plan.rank, dtype=torch.float16)
    section = StepSection(SectionBasis(mean, basis, {}), plan, int8=False)
    held = torch.cat([part.columns for part in reversed(plan.packed)])
    own = coefficients[:, held].contiguous()
    ones = np.ones(len(own), np.float32)
    streams = section.payload(own, ones)
    encoded = ENTROPY.encode(streams)
    raw = sum(map(len, streams))
    payload = ENTROPY.decode(encoded.units, memoryview(encoded.body), raw)
    out = np.zeros(own.shape, np.float32)
    return {
        "quantise_and_pack": partial(section.payload, own, ones),
        "deflate": partial(ENTROPY.encode, streams),
        "inflate": partial(ENTROPY.decode, encoded.units, memoryview(encoded.body), raw),
        "unpack": partial(section.coefficients, payload, out),
    }


if __name__ == "__main__":
    main()
