"""What a basis in parts saves on one CPU core: its two products, against those of a whole basis.

    python -m benchmarks.basis_parts [--elements 11520] [--columns 3400] [--parts 3] [--turned 900]
                                     [--tokens 128,512] [--out benchmarks/results/basis-parts.json]

Columns and rows are drawn at random: times depend on sizes and on which elements are 0 alone.
`turned` columns are of all elements, each of the others of one part of K and of V, in an order
drawn at random. CPU time; both bases take their turn in every round, and a
figure is the median of the rounds' own ratios, whole over parts. multiplications: in parts over
whole. Products are those that the codec uses on this machine (`precision`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.codec import ROOT, seconds
from kvtc_vllm.codec.cpu.products import Float32Product, Int8Product, Product, has_int8_products

ROUNDS = 9
WAYS = ("encode", "decode")


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.basis_parts", description=__doc__)
    add = parser.add_argument
    add("--elements", type=int, default=11520, help="of a row: K, then V")
    add("--columns", type=int, default=3400, help="that all tokens have")
    add("--parts", type=int, default=3)
    add("--turned", type=int, default=900, help="columns of all parts")
    add("--tokens", default="128,512", help="of a product")
    add("--out", type=Path, default=ROOT / "benchmarks/results/basis-parts.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    whole, parts = bases(args.elements, args.columns, args.parts, args.turned)
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.basis_parts --elements {args.elements} --columns "
        f"{args.columns} --parts {args.parts} --turned {args.turned} --tokens {args.tokens}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 used",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "precision": "int8" if has_int8_products() else "float32",
        "versions": {p: version(p) for p in ("kvtc-vllm", "torch", "numba")},
        "multiplications": round(float((parts != 0).sum()) / whole.numel(), 3),
        "rows": [measure(int(tokens), whole, parts) for tokens in args.tokens.split(",")],
    }
    for row in result["rows"]:
        print(*(f"{name} {value}" for name, value in row.items()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def bases(
    elements: int, columns: int, parts: int, turned: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole basis and one in parts, float32 [elements, columns]."""
    drawn = torch.Generator().manual_seed(0)
    whole = torch.randn(elements, columns, generator=drawn) / elements**0.5
    tensor_size = elements // 2
    part = torch.arange(elements) % tensor_size * parts // tensor_size
    own = torch.arange(columns) % parts
    own[:turned] = -1
    own = own[torch.randperm(columns, generator=drawn)]
    return whole, torch.where((own < 0) | (own == part[:, None]), whole, 0.0)


def measure(tokens: int, whole: torch.Tensor, parts: torch.Tensor) -> dict[str, float]:
    """One row of the table."""
    drawn = torch.Generator().manual_seed(1)
    row: dict[str, float] = {"tokens": tokens}
    for elements, way in enumerate(WAYS):
        products = [product(x if elements == 0 else x.T, elements) for x in (whole, parts)]
        rows = torch.randn(tokens, whole.shape[elements], generator=drawn).numpy()
        calls = [partial(own.of, own.operand(rows)) for own in products]
        for call in calls:
            call()
        times = [[seconds(call) for call in calls] for _ in range(ROUNDS)]
        row[f"{way}_faster"] = round(statistics.median(a / b for a, b in times), 2)
        row[f"{way}_us_per_token"] = round(1e6 * statistics.median(b for _, b in times) / tokens, 1)
    return row


def product(matrix: torch.Tensor, elements: int) -> Product:
    """As the codec has it."""
    if has_int8_products():
        return Int8Product(matrix, elements)
    return Float32Product(matrix, elements)


if __name__ == "__main__":
    main()
