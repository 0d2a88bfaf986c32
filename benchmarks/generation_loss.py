"""What encoding again and again costs: a chunk that is stored from decoded values, ten times.

    python -m benchmarks.generation_loss [--artifact DIR] [--rows N] [--out FILE]

With `exclusive`, a chunk may have to be encoded from what was decoded, once no tier has it any
more. Rows are the probe of an artifact, held-out KV of real text; by default the reference
model's. Errors are relative to the deviation from the mean, squared, against the rows of the start;
K without its rotation. The blob's bytes are given for every round.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.codec_rows import ROOT, Rows, probe_rows
from kvtc_vllm.codec.artifact import Kind
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.transform import chunk_rows

ROUNDS = 10
OUT = ROOT / "benchmarks/results/generation_loss.json"


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.generation_loss", description=__doc__)
    parser.add_argument("--artifact", type=Path, help="directory of an artifact")
    parser.add_argument("--rows", type=int, default=128, help="tokens per chunk")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = probe_rows(args.artifact, args.rows)
    table = [row for ratio in rows.artifact.ratios() for row in measure(rows, ratio)]
    for row in table:
        print(*(f"{name} {value}" for name, value in row.items()))
    option = " --artifact DIR" if args.artifact else ""
    result = {
        "command": f"python -m benchmarks.generation_loss{option}",
        "rows_of": rows.source,
        "chunk_tokens": rows.tokens,
        "rows": table,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(rows: Rows, ratio: float, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Errors and bytes of one ratio, by round; round 1 is an ordinary store and load."""
    codec = open_codec("kvtc", rows.k.dtype, artifact=rows.artifact, ratio=ratio)
    k, v = rows.k, rows.v
    table = []
    for number in range(1, rounds + 1):
        blob = codec.encode(k, v, rows.start)
        decoded = codec.decode(blob)
        k, v = decoded.k, decoded.v
        table.append(
            {
                "ratio": ratio,
                "round": number,
                "k_error": _error(rows, "k", k, v),
                "v_error": _error(rows, "v", k, v),
                "bytes": len(blob),
            }
        )
    return table


def _error(rows: Rows, kind: Kind, k: torch.Tensor, v: torch.Tensor) -> float:
    """Relative squared error over deviation from the mean, K without rotation."""
    positions = torch.arange(rows.start, rows.start + rows.tokens)
    wrong = total = 0.0
    for group in range(len(rows.artifact.geometry.layer_groups)):
        x, y = (
            chunk_rows(*pair, group, kind, rows.artifact, positions).double()
            for pair in ((rows.k, rows.v), (k, v))
        )
        wrong += float((x - y).square().sum())
        total += float((x - rows.mean(group, kind)).square().sum())
    return round(wrong / total, 6)


if __name__ == "__main__":
    main()
