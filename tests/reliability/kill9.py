"""kill -9 of a real writer process, then a restart that must find a sound tier.

    python -m tests.reliability.kill9 --cycles 200

Every cycle forks writers on one root whose cap is small, so that they write, evict,
remove, touch and read all the time; kills them at a random moment; opens the tier as a
restarted engine would; and checks: opening and scanning succeed, no temporary is left,
the ledger equals what is on disk and is within the cap, and every chunk reads as what was
written. The root lives on through all cycles. `--points` kills at every single
file-system call instead, before and after it, and in the middle of every write. `--shared`: of
chunks with few bodies among them, so that most are references.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from kvtc_vllm.tiers.disk import DiskError, DiskStore, FileSystem
from tests.reliability.blobs import NAMESPACE, blob_of, key_of, twin_of
from tests.reliability.disk import (
    bytes_on_disk,
    chunk_files,
    kept_bytes,
    ledger_bytes,
    links,
    temporaries,
)
from tests.reliability.faults import KillingFileSystem, WrappedFileSystem

CAPACITY = 64 * 4096
KEYS = 60
LONGEST_RUN_SECONDS = 0.02


class Blobs(NamedTuple):
    """What is written. small: in the scenario, in which `pages` are not enough for all."""

    of: Callable[[bytes], bytes]
    small: Callable[[bytes], bytes]
    pages: int
    tenant: bytes


OWN = Blobs(blob_of, partial(blob_of, longest=4000), 4, b"")
SHARED = Blobs(twin_of, partial(twin_of, longest=8000, bodies=1), 5, b"one")


class Unsound(AssertionError):
    """A promise was broken."""


def write_forever(root: Path, seed: int, blobs: Blobs) -> None:
    """The victim: random operations until killed. A wrong blob is reported by exit status 3."""
    generator = random.Random(seed)
    store = DiskStore(root, NAMESPACE, capacity=CAPACITY, min_free=0)
    store.scan()
    while True:
        key = key_of(generator.randrange(KEYS))
        action = generator.random()
        try:
            if action < 0.6:
                store.write(key, blobs.of(key), blobs.tenant)
            elif action < 0.8:
                if store.read(key) != blobs.of(key):
                    os._exit(3)
            elif action < 0.9:
                store.remove([key])
            else:
                store.touch([key])
        except DiskError as error:
            if error.reason != "missing":
                os._exit(4)


def check_restart(root: Path, blobs: Blobs) -> int:
    """What a restarted engine does, and whether it may rely on it; returns the chunks found."""
    store = DiskStore(root, NAMESPACE, capacity=CAPACITY, min_free=0)
    try:
        entries = store.scan()
        if temporaries(root):
            raise Unsound(f"temporaries after restart: {temporaries(root)}")
        on_disk = bytes_on_disk(root)
        listed = sum(entry.size for entry in entries) + kept_bytes(root)
        if not ledger_bytes(root) == on_disk == listed:
            raise Unsound(f"ledger {ledger_bytes(root)}, on disk {on_disk}, listed {listed}")
        if on_disk > CAPACITY:
            raise Unsound(f"{on_disk} bytes exceed the cap of {CAPACITY}")
        if len(entries) != len(chunk_files(root)):
            raise Unsound(f"{len(entries)} entries of {len(chunk_files(root))} files")
        for entry in entries:
            if store.read(entry.key) != blobs.of(entry.key):
                raise Unsound(f"wrong blob under {entry.key.hex()}")
        if store.errors():
            raise Unsound(f"errors after restart: {store.errors()}")
    finally:
        store.close()
    return len(entries)


def random_kills(
    root: Path, cycles: int, writers: int, seed: int, blobs: Blobs = OWN
) -> dict[str, float]:
    """Kill at random moments. Raises Unsound."""
    generator = random.Random(seed)
    began = time.monotonic()
    chunks = in_flight = references = 0
    for cycle in range(cycles):
        victims = [
            fork(write_forever, root, seed + cycle * writers + n, blobs) for n in range(writers)
        ]
        time.sleep(generator.uniform(0.001, LONGEST_RUN_SECONDS))
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        for victim in victims:
            expect_killed(victim)
        in_flight += len(temporaries(root))
        chunks += check_restart(root, blobs)
        references += len(links(root))
    return {
        "cycles": cycles,
        "killed": cycles * writers,
        "temporaries_left_by_kills": in_flight,
        "chunks_checked": chunks,
        "references_among_them": references,
        "seconds": round(time.monotonic() - began, 1),
    }


def scenario(root: Path, filesystem: FileSystem, blobs: Blobs = OWN) -> None:
    """Every kind of change once: write, evict, replace, remove, touch, scan, close."""
    capacity = blobs.pages * 4096
    store = DiskStore(root, NAMESPACE, capacity=capacity, min_free=0, filesystem=filesystem)
    store.scan()
    keys = [key_of(number) for number in range(6)]
    for key in keys[:5]:
        store.write(key, blobs.small(key), blobs.tenant)  # four fit
    store.touch(keys[2:4])
    store.read(keys[2])
    store.remove([keys[1], keys[3]])
    store.write(keys[5], blobs.small(keys[5]), blobs.tenant)
    store.remove(keys[:1])  # to which others may refer
    store.read(keys[5])
    store.remove(keys[2:])
    store.scan()
    store.close()


def kill_points(root: Path, rounds: int, blobs: Blobs = OWN) -> dict[str, float]:
    """Kill at every call of the scenario. Raises Unsound."""
    counting = WrappedFileSystem()
    scenario(root / "count", counting, blobs)
    began = time.monotonic()
    points = len(counting.calls)
    for round_number in range(rounds):
        for at in range(1, points + 1):
            for after in (False, True):
                place = root / f"{round_number}-{at}-{after}"
                victim = fork(scenario, place, KillingFileSystem(at, after), blobs)
                expect_killed(victim)
                check_small(place, blobs)
    return {
        "kill_points": points,
        "links": counting.calls.count("link"),
        "killed": 2 * points * rounds,
        "seconds": round(time.monotonic() - began, 1),
    }


def check_small(root: Path, blobs: Blobs) -> None:
    """`check_restart`, with the blobs of the scenario."""
    store = DiskStore(root, NAMESPACE, capacity=blobs.pages * 4096, min_free=0)
    entries = store.scan()
    if temporaries(root) or ledger_bytes(root) != bytes_on_disk(root):
        raise Unsound(f"{root}: {temporaries(root)}, ledger {ledger_bytes(root)}")
    for entry in entries:
        if store.read(entry.key) != blobs.small(entry.key):
            raise Unsound(f"wrong blob under {entry.key.hex()}")
    key = key_of(9)
    store.write(key, blobs.small(key), blobs.tenant)
    if store.errors() or store.read(key) != blobs.small(key):
        raise Unsound(f"{root}: {store.errors()} after the restart")
    store.close()


def fork(function, *arguments) -> int:
    """Run in a child; the caller must have no threads."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        except BaseException as error:
            print(f"victim: {error!r}", file=sys.stderr)
            os._exit(5)
        os._exit(0)
    return child


def expect_killed(victim: int) -> None:
    _, status = os.waitpid(victim, 0)
    if not os.WIFSIGNALED(status):
        raise Unsound(f"the victim ended by itself with status {os.WEXITSTATUS(status)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--writers", type=int, default=2, help="processes killed a cycle")
    parser.add_argument("--points", type=int, default=0, help="rounds over every kill point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", action="store_true", help="chunks with few bodies among them")
    args = parser.parse_args()
    blobs = SHARED if args.shared else OWN
    with tempfile.TemporaryDirectory() as place:
        if args.points:
            print(kill_points(Path(place), args.points, blobs))
        else:
            root = Path(place) / "tier"
            print(random_kills(root, args.cycles, args.writers, args.seed, blobs))


if __name__ == "__main__":
    main()
