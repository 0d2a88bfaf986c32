"""How long a restart takes: opening and scanning a namespace of many chunks.

    python -m benchmarks.reliability.scan_time [--chunks 100000] [--root DIR] [--cold] [--out FILE]

Files are of one byte: a scan reads names and attributes, not content. Measured are starts without
a list of the files, as of a directory of an earlier version, and with one, each with the kernel's
caches warm, as after a restart of the engine, and with `--cold` after dropping them (needs root,
and slows whatever else runs there). Elapsed time includes waiting for other programs on a busy
machine; processor time does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from kvtc_vllm.tiers.disk import DiskStore
from kvtc_vllm.tiers.disk.layout import LIST_FILE, chunk_path
from kvtc_vllm.tiers.disk.store import LISTED_FROM
from kvtc_vllm.tiers.keys import RecordKey

NAMESPACE = bytes(16)
WARM_ROUNDS = 3
COLD_ROUNDS = 2


def main() -> None:
    """Make the files, scan them, print seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--root", help="where to make a temporary directory")
    parser.add_argument("--cold", action="store_true", help="drop the kernel's caches too")
    parser.add_argument("--out", type=Path, help="write JSON there")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="kvtc-scan-", dir=args.root))
    result: dict[str, Any] = {"chunks": args.chunks}
    try:
        make_chunks(root / NAMESPACE.hex(), args.chunks)
        result["without a list"] = starts(root, args.chunks, args.cold)
        result["list written"] = write_list(root, args.chunks)
        result["with a list"] = starts(root, args.chunks, args.cold)
    finally:
        shutil.rmtree(root)
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def starts(root: Path, expected: int, cold: bool) -> dict[str, dict[str, float]]:
    """Median seconds of starts from warm caches, and from cold ones."""
    rounds = {"warm": WARM_ROUNDS} | ({"cold": COLD_ROUNDS} if cold else {})
    found: dict[str, dict[str, float]] = {}
    restart(root, expected)
    for state, number in rounds.items():
        times = []
        for _ in range(number):
            if state == "cold":
                drop_caches()
            times.append(restart(root, expected))
        elapsed, processor = zip(*times, strict=True)
        found[state] = {
            "elapsed, s": round(statistics.median(elapsed), 3),
            "processor, s": round(statistics.median(processor), 3),
        }
        print(state, found[state], flush=True)
    return found


def drop_caches() -> None:
    """Have the kernel forget directories, inodes and contents. Raises OSError without the right."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def write_list(root: Path, expected: int) -> dict[str, float]:
    """Elapsed and processor seconds of writing the list, and its size."""
    store = DiskStore(root, NAMESPACE)
    store.scan()
    began, worked = time.perf_counter(), time.process_time()
    if expected >= LISTED_FROM and not store.keep_list(time.monotonic() + 600):
        raise RuntimeError("the list was not written")
    seconds = time.perf_counter() - began, time.process_time() - worked
    store.close()
    path = root / NAMESPACE.hex() / LIST_FILE
    return {
        "elapsed, s": round(seconds[0], 3),
        "processor, s": round(seconds[1], 3),
        "MB": round(path.stat().st_size / 1e6, 1) if path.exists() else 0.0,
    }


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
