"""Several processes on one root, each checking what it sees against a model.

    python -m tests.reliability.replicas --processes 8 --operations 10000

Two namespaces (two ranks, say) share the root; half of the operations run under a cap that
never binds, half under one that evicts all the time. Every process owns some keys, of which it
knows exactly whether they may exist, and fights with the others over the shared rest. A
divergence is: another blob than the one written, a chunk that its owner removed or never
wrote, one that is missing although nothing was evicted, a scan that disagrees with the
owner's model, more bytes on disk than the cap or than the ledger says, a leaked descriptor or
temporary, an error other than "missing". `--shared`: of chunks with few bodies among them.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from kvtc_vllm.tiers.disk import DiskError, DiskStore
from tests.reliability import disk
from tests.reliability.blobs import NAMESPACE, OTHER_NAMESPACE, blob_of, key_of, twin_of
from tests.reliability.kill9 import fork

ROOMY = 2**40
TIGHT = 100 * 4096
OWN_KEYS = 30
SHARED_KEYS = 40
CHECK_EVERY = 20
LOCK_WAIT_SECONDS = 900
"""Nothing here is about time: a process that gets no core, or is stopped for a while, waits."""


class Replica:
    """One process. Raises AssertionError at the first divergence."""

    def __init__(self, root: Path, number: int, capacity: int, seed: int, shared: bool) -> None:
        self.root = root
        self.blob_of = twin_of if shared else blob_of
        self.tenant = b"one" if shared else b""
        self.capacity = capacity
        self.namespace = (NAMESPACE, OTHER_NAMESPACE)[number % 2]
        self.random = random.Random(seed)
        self.own = [key_of(1000 * (number + 1) + n) for n in range(OWN_KEYS)]
        self.shared = [key_of(n) for n in range(SHARED_KEYS)]
        self.present: set[bytes] = set()
        self.descriptors = disk.open_descriptors()
        self.store = DiskStore(
            root,
            self.namespace,
            capacity=capacity,
            min_free=0,
            lock_wait_seconds=LOCK_WAIT_SECONDS,
        )

    def run(self, operations: int) -> None:
        for number in range(operations):
            keys = self.own if self.random.random() < 0.6 else self.shared
            key = self.random.choice(keys)
            action = self.random.choices(
                (self.write, self.read, self.remove, self.touch, self.scan), (45, 30, 15, 9, 1)
            )[0]
            action(key)
            self.present -= set(self.store.take_evicted())
            if number % CHECK_EVERY == 0:
                self.check_bytes()
        # What another replaced while it was compared is not referred to.
        errors = {reason for call, reason in self.store.errors() if call != "refer"} - {"missing"}
        assert not errors, self.store.errors()
        self.store.close()
        assert disk.open_descriptors() == self.descriptors

    def blob(self, key: bytes) -> bytes:
        return self.blob_of(key, self.namespace, longest=16_000)

    def write(self, key: bytes) -> None:
        self.store.write(key, self.blob(key), self.tenant)
        if key in self.own:
            self.present.add(key)

    def read(self, key: bytes) -> None:
        try:
            found = self.store.read(key)
        except DiskError as error:
            if error.reason != "missing":
                raise
            self.was_missing(key)
        else:
            assert found == self.blob(key), f"wrong blob under {key.hex()}"
            assert key not in self.own or key in self.present, f"{key.hex()} came back"

    def remove(self, key: bytes) -> None:
        removed = self.store.remove([key])
        if not removed:
            self.was_missing(key)
        self.present.discard(key)

    def touch(self, key: bytes) -> None:
        if self.store.touch([key]):
            self.was_missing(key)

    def scan(self, key: bytes) -> None:
        found = {entry.key for entry in self.store.scan()}.intersection(self.own)
        if self.capacity == ROOMY:
            assert found == self.present, "the scan disagrees with the model"
        else:
            assert found <= self.present, "the scan shows what is not there"

    def was_missing(self, key: bytes) -> None:
        if self.capacity == ROOMY:
            assert key not in self.present, f"{key.hex()} is gone"
        self.present.discard(key)

    def check_bytes(self) -> None:
        with disk.standing_still(self.root):
            used, ledger = disk.bytes_on_disk(self.root), disk.ledger_bytes(self.root)
        assert used == ledger, f"{used} bytes on disk, {ledger} in the ledger"
        assert used <= self.capacity, f"{used} bytes exceed the cap of {self.capacity}"


def run(
    root: Path, processes: int, operations: int, seed: int, shared: bool = False
) -> dict[str, object]:
    """Both halves. The result's `divergences` is the number of processes that found one."""
    began = time.monotonic()
    divergences = references = 0
    for capacity in (ROOMY, TIGHT):
        place = root / str(capacity)
        place.mkdir()
        (place / "ledger.json").touch()
        children = [
            fork(_replica, place, number, capacity, operations // 2 // processes, seed, shared)
            for number in range(processes)
        ]
        divergences += sum(os.waitpid(child, 0)[1] != 0 for child in children)
        left = disk.temporaries(place)
        references += len(disk.links(place))
        exact = disk.ledger_bytes(place) == disk.bytes_on_disk(place) <= capacity
        if left or not exact:
            print(f"after the last process: {left}, ledger exact: {exact}", file=sys.stderr)
            divergences += 1
    return {
        "processes": processes,
        "operations": operations // 2 // processes * processes * 2,
        "divergences": divergences,
        "references": references,
        "seconds": round(time.monotonic() - began, 1),
    }


def _replica(
    root: Path, number: int, capacity: int, operations: int, seed: int, shared: bool
) -> None:
    Replica(root, number, capacity, seed + number, shared).run(operations)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", action="store_true", help="chunks with few bodies among them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        result = run(Path(place), args.processes, args.operations, args.seed, args.shared)
    print(result)
    return 1 if result["divergences"] else 0


if __name__ == "__main__":
    sys.exit(main())
