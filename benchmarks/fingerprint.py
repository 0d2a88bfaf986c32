"""What it costs to tell which weights a model has, the first time and once they are remembered.

    python -m benchmarks.fingerprint [--out benchmarks/results/fingerprint.json]

Makes checkpoints without holes in a temporary directory (16 GB only where 40 GB are free, else a
quarter) and deletes them. Before a cold run the kernel is asked to forget their pages; what a
hypervisor or the disk itself caches is beyond that. 140 GB are not made: their time is that
of as many regions at the rate of the largest checkpoint that is sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from kvtc_vllm.artifact import remembered, sampling
from kvtc_vllm.artifact.identity import FULL_HASH_LIMIT, weights_fingerprint

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
SHARD_BYTES = 5 * 10**9
BLOCK = os.urandom(64 * 2**20)
ROOM_BYTES = 40 * 10**9
TENSORS_OF_70B = 723
SECONDS_UNTIL_OLD = 2.5


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.fingerprint", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fingerprint.json")
    args = parser.parse_args()
    large = 16 * 10**9
    if shutil.disk_usage(tempfile.gettempdir()).free < ROOM_BYTES:
        large //= 4
    rows = []
    for size, tensors, limit in (
        (3 * 10**8, 147, FULL_HASH_LIMIT),
        (large, 291, FULL_HASH_LIMIT if large > FULL_HASH_LIMIT else 0),
    ):
        with tempfile.TemporaryDirectory(prefix="kvtc-fingerprint-") as place:
            rows.append(measure(Path(place), size, tensors, limit))
    rows.append(extrapolated(rows[-1], 140 * 10**9, TENSORS_OF_70B))
    header = ("GB", "mode", "regions", "cold s", "warm s", "remembered ms", "measured")
    print("{:>6} {:>8} {:>8} {:>8} {:>8} {:>14} {:>9}".format(*header))
    for row in rows:
        print(
            f"{row['gigabytes']:6} {row['mode']:>8} {row['regions']:8} {row['cold_s']:8} "
            f"{row['warm_s']:8} {row['remembered_ms']:14} {row['measured']!s:>9}"
        )
    result = {
        "command": "python -m benchmarks.fingerprint",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one local disk",
        "rounds": f"median of {ROUNDS}",
        "page_cache": "cold: dropped with posix_fadvise(DONTNEED); warm: read just before",
        "not_measured": "extrapolated by the rate of regions of the row before",
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(place: Path, size: int, tensors: int, limit: int) -> dict[str, float | str | bool]:
    """Make a checkpoint and time it: cold and warm reads, and a new process that remembers."""
    model = place / "model"
    model.mkdir()
    make_checkpoint(model, size, tensors)
    time.sleep(SECONDS_UNTIL_OLD)  # or it would not be remembered
    cold, warm, again = [], [], []
    for round_number in range(ROUNDS):
        os.environ[remembered.CACHE_VARIABLE] = str(place / str(round_number))
        forget_pages(model)
        cold.append(_seconds(model, limit))
        os.environ[remembered.CACHE_VARIABLE] = str(place / f"{round_number}-warm")
        warm.append(_seconds(model, limit))
        again.append(_seconds(model, limit))
    whole = size <= limit
    return {
        "gigabytes": size / 1e9,
        "mode": "whole" if whole else "sampled",
        "tensors": tensors,
        "regions": 0 if whole else tensors * sampling.MOST_REGIONS,
        "cold_s": round(statistics.median(cold), 3),
        "warm_s": round(statistics.median(warm), 3),
        "remembered_ms": round(1000 * statistics.median(again), 2),
        "measured": True,
    }


def extrapolated(
    row: dict[str, float | str | bool], size: int, tensors: int
) -> dict[str, float | str | bool]:
    """A larger checkpoint at the rate of regions of a measured one."""
    regions = tensors * sampling.MOST_REGIONS
    factor = regions / float(row["regions"])
    return row | {
        "gigabytes": size / 1e9,
        "tensors": tensors,
        "regions": regions,
        "cold_s": round(float(row["cold_s"]) * factor, 3),
        "warm_s": round(float(row["warm_s"]) * factor, 3),
        "measured": False,
    }


def make_checkpoint(directory: Path, size: int, tensors: int) -> None:
    """Safetensors files of `size` bytes in total, with equal tensors."""
    shards = -(-size // SHARD_BYTES)
    each = size // tensors // 2 * 2
    for shard in range(shards):
        names = [f"layers.{i}.weight" for i in range(shard, tensors, shards)]
        header = json.dumps(
            {
                name: {
                    "dtype": "BF16",
                    "shape": [each // 2],
                    "data_offsets": [i * each, (i + 1) * each],
                }
                for i, name in enumerate(names)
            }
        ).encode()
        with (directory / f"model-{shard}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            left = len(names) * each
            while left:
                left -= file.write(BLOCK[:left])
            os.fsync(file.fileno())


def forget_pages(directory: Path) -> None:
    """Have the kernel drop the files' pages from its cache."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds(model: Path, limit: int) -> float:
    """As a process that has just started."""
    remembered._known.clear()
    began = time.perf_counter()
    weights_fingerprint(model, limit)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
