"""How long a restart takes: opening and scanning a namespace of many chunks.

    python -m benchmarks.reliability.scan_time [--chunks 100000] [--root DIR]

Files are of one byte: a scan reads names and attributes, not content. The first scan after
making them is reported apart; the kernel's caches are warm, as after a restart of the engine.
Elapsed time includes waiting for other programs on a busy machine; processor time does not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from kvtc_vllm.tiers.disk import DiskStore
from kvtc_vllm.tiers.disk.layout import chunk_path
from kvtc_vllm.tiers.keys import RecordKey

NAMESPACE = bytes(16)
ROUNDS = 5


def main() -> None:
    """Make the files, scan them, print seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--root", help="where to make a temporary directory")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="kvtc-scan-", dir=args.root))
    try:
        make_chunks(root / NAMESPACE.hex(), args.chunks)
        times = [restart(root, args.chunks) for _ in range(ROUNDS + 1)]
    finally:
        shutil.rmtree(root)
    for name, seconds in zip(("elapsed", "processor"), zip(*times, strict=True), strict=True):
        print(
            f"{args.chunks} chunks, {name}: first scan {seconds[0]:.3f} s, then median "
            f"{statistics.median(seconds[1:]):.3f} s, least {min(seconds[1:]):.3f} s"
        )


def make_chunks(directory: Path, number: int) -> None:
    """Files with names as the store gives them."""
    for first in range(256):
        (directory / f"{first:02x}").mkdir(parents=True)
    for _ in range(number):
        with open(chunk_path(str(directory), RecordKey(os.urandom(32))), "wb") as file:
            file.write(b"x")


def restart(root: Path, expected: int) -> tuple[float, float]:
    """Elapsed and processor seconds to open and scan."""
    began, worked = time.perf_counter(), time.process_time()
    store = DiskStore(root, NAMESPACE)
    found = len(store.scan())
    seconds = time.perf_counter() - began, time.process_time() - worked
    store.close()
    if found != expected:
        raise RuntimeError(f"{found} chunks found, {expected} made")
    return seconds


if __name__ == "__main__":
    main()
