"""Chunks out of and into the cache of a CPU engine: through strides, and through a table.

    python -m benchmarks.cpu_pages [--out benchmarks/results/cpu_pages.json]

The page order is what this machine's vLLM uses. Both ways take turns in every round, on one
thread; a speed-up is the median of the rounds' own ratios. `copy` (blocks as they are) does not
depend on the order and stands beside as what memory allows. Milliseconds per chunk of 128 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kvtc_vllm.offload.geometry import CacheGroup
from kvtc_vllm.vllm_cache.cpu_pages import PermutedOrder
from kvtc_vllm.vllm_cache.layout import PagedLayout

ROOT = Path(__file__).parents[1]
BLOCK, BLOCKS, CACHE_BLOCKS = 32, 4, 64
ROUNDS = 31
SHAPES = {"SmolLM2-135M": (30, 3, 64), "Llama-3.1-8B": (32, 8, 128)}
"""Layers, KV heads, head size."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def layout_of(shape: tuple[int, int, int], dtype: torch.dtype) -> PagedLayout:
    """Of a cache with random elements."""
    layers, heads, size = shape
    names = tuple(f"layers.{i}" for i in range(layers))
    group = CacheGroup(names, BLOCK, heads, size, size, dtype)
    pages = (CACHE_BLOCKS, heads, BLOCK, 2 * size)
    return PagedLayout({name: torch.randn(pages).to(dtype) for name in names}, group)


def through_table(layout: PagedLayout) -> None:
    """Take from a layout what it knows about strides."""
    order = layout._order
    assert isinstance(order, PermutedOrder)
    order._halves = tuple(replace(half, tokens=None, dims=None) for half in order._halves)


def milliseconds(call: Callable[[], object]) -> float:
    """Of this thread's processor time."""
    began = time.thread_time()
    call()
    return (time.thread_time() - began) * 1e3


def measure(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """One row. Raises AssertionError if the two ways differ."""
    strides, table = layout_of(shape, dtype), layout_of(shape, dtype)
    through_table(table)
    blocks = list(range(3, 3 + BLOCKS))
    copied = strides.copy(blocks)
    rows = strides.unpack(copied)
    for ours, theirs in zip(rows, table.unpack(copied), strict=True):
        assert torch.equal(ours, theirs)
    calls: dict[str, Callable[[], object]] = {"copy": partial(strides.copy, blocks)}
    for name, layout in (("strides", strides), ("table", table)):
        calls[f"unpack, {name}"] = partial(layout.unpack, copied)
        calls[f"scatter, {name}"] = partial(layout.scatter, blocks, *rows)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    for layout in (strides, table):
        assert torch.equal(layout.copy(blocks), copied)
    found = {f"{name}, ms": round(statistics.median(values), 2) for name, values in times.items()}
    for what in ("unpack", "scatter"):
        pairs = zip(times[f"{what}, table"], times[f"{what}, strides"], strict=True)
        found[f"{what}, times faster"] = round(statistics.median(a / b for a, b in pairs), 1)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cpu_pages.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()
    rows = [
        {"shape": name, "dtype": word, **measure(shape, dtype)}
        for name, shape in SHAPES.items()
        for word, dtype in DTYPES.items()
    ]
    result = {
        "command": "python -m benchmarks.cpu_pages",
        "tokens": BLOCK * BLOCKS,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": {"before": load, "after": os.getloadavg()},
        "versions": {p: version(p) for p in ("kvtc-vllm", "vllm", "torch")},
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
