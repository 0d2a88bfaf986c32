"""How long a restart takes: opening a namespace of many chunks and finding what is there.

    python -m benchmarks.reliability.scan_time [--chunks 100000] [--root DIR] [--cold]
        [--before TREE] [--out FILE]

Files are of one byte: a scan reads names and attributes, not content. Measured are starts without
a list of the files, as of a directory of an earlier version, and with one, each with the kernel's
caches warm, as after a restart of the engine, and with `--cold` after dropping them (needs root,
and slows whatever else runs there). Elapsed time includes waiting for other programs on a busy
machine; processor time does not. Every start is a process of its own, without what it imports.

`--before` names another checkout of this repository. Its starts and those of this one take turns,
on the same files. `--make` makes the files in `--root` and ends; a later run finds them there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from kvtc_vllm.artifact.replacing import replacing
from kvtc_vllm.tiers.disk import DiskStore
from kvtc_vllm.tiers.disk.layout import LIST_FILE, chunk_path
from kvtc_vllm.tiers.disk.store import LISTED_FROM
from kvtc_vllm.tiers.keys import RecordKey

HERE = Path(__file__).resolve().parents[2]
NAMESPACE = bytes(16)
START = """
import sys, time
from kvtc_vllm.tiers.disk import DiskStore
began, worked = time.perf_counter(), time.process_time()
store = DiskStore(sys.argv[1], bytes(16))
found = len(store.inventory())
print(time.perf_counter() - began, time.process_time() - worked, found)
store.close()
"""


def main() -> None:
    """Make the files, scan them, print seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--root", help="where to make a temporary directory")
    parser.add_argument("--make", action="store_true", help="only make the files, in --root itself")
    parser.add_argument("--cold", action="store_true", help="drop the kernel's caches too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--out", type=Path, help="write JSON there")
    args = parser.parse_args()
    if args.make:
        make_chunks(Path(args.root) / NAMESPACE.hex(), args.chunks)
        return
    made = args.root is not None and (Path(args.root) / NAMESPACE.hex()).is_dir()
    root = Path(args.root if made else tempfile.mkdtemp(prefix="kvtc-scan-", dir=args.root))
    trees = {"now": HERE} | ({"before": args.before.resolve()} if args.before else {})
    about = {"chunks": args.chunks, "rounds": args.rounds}
    result: dict[str, Any] = about | {"commits": commits(trees)}
    try:
        if not made:
            make_chunks(root / NAMESPACE.hex(), args.chunks)
        (root / NAMESPACE.hex() / LIST_FILE).unlink(missing_ok=True)  # of an earlier run
        for name, measure in (
            ("without a list", partial(starts, trees, root, args)),
            ("list written", partial(write_list, root, args.chunks)),
            ("with a list", partial(starts, trees, root, args)),
        ):
            result[name] = measure()
            if args.out is not None:  # a run that is cut short leaves what it measured
                with replacing(args.out) as unfinished:
                    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        if not made:
            shutil.rmtree(root)
    print(json.dumps(result, indent=1))


def commits(trees: dict[str, Path]) -> dict[str, str]:
    """What is compared."""
    command = ["git", "describe", "--always", "--dirty"]
    return {
        name: subprocess.run(
            command, cwd=tree, capture_output=True, text=True, check=True
        ).stdout.strip()
        for name, tree in trees.items()
    }


def starts(
    trees: dict[str, Path], root: Path, args: argparse.Namespace
) -> dict[str, dict[str, dict[str, float]]]:
    """Median seconds of starts from warm caches, and from cold ones, of each tree in turns."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    restart(HERE, root, args.chunks)
    for state in ("warm", "cold") if args.cold else ("warm",):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in trees}
        for _ in range(args.rounds):
            for name, tree in trees.items():
                if state == "cold":
                    drop_caches()
                times[name].append(restart(tree, root, args.chunks))
        found[state] = {
            name: {
                "elapsed, s": round(statistics.median(elapsed for elapsed, _ in each), 3),
                "processor, s": round(statistics.median(worked for _, worked in each), 3),
            }
            for name, each in times.items()
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


def restart(tree: Path, root: Path, expected: int) -> tuple[float, float]:
    """Elapsed and processor seconds in which a checkout opens the namespace and lists it."""
    command = [sys.executable, "-c", START, str(root)]
    done = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, text=True, check=True)
    elapsed, worked, found = done.stdout.split()
    if int(found) != expected:
        raise RuntimeError(f"{found} chunks found, {expected} made")
    return float(elapsed), float(worked)


if __name__ == "__main__":
    main()
