"""A tier at its cap under steady churn: bytes on disk, descriptors and memory over time.

    python -m benchmarks.reliability.endurance --seconds 300

What an engine does, through the same pools: writes that evict, reads, touches, removals, and now
and then a restart on the same directory. Prints a dictionary.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvtc_vllm.tiers.disk import DiskError, DiskStore, IoPool
from kvtc_vllm.tiers.keys import RecordKey
from tests.reliability import disk
from tests.reliability.blobs import NAMESPACE, blob_of, key_of

CAPACITY = 4 << 20
LONGEST = 20_000
KEYS = 1000
SAMPLE_SECONDS = 2.0
RESTART_EVERY = 5
WARM_UP = 0.2
"""Of the time, before which memory may still grow."""
ENOUGH_SECONDS = 1800.0
"""Below it a rate an hour would be guesswork, since allocators settle slowly."""


def run(seconds: float, seed: int) -> dict[str, object]:
    """Churn; `failures` counts broken promises."""
    chance = random.Random(seed)
    samples = Samples(seconds)
    largest = operations = restarts = wrong = 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        pool = IoPool(threads=2, queue_limit=64)
        store = _open(root)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            until = time.monotonic() + SAMPLE_SECONDS
            while time.monotonic() < until:
                batch = [key_of(chance.randrange(KEYS)) for _ in range(20)]
                calls = [
                    pool.submit(_Operation(store, RecordKey(key), chance), 30) for key in batch
                ]
                for call in calls:
                    wrong += call.wait()
                operations += len(batch)
            with disk.standing_still(root):
                largest = max(largest, disk.bytes_on_disk(root))
            now = time.monotonic() - began
            samples.take(now)
            if samples.count % RESTART_EVERY == 0:
                store.close()
                store = _open(root)
                restarts += 1
        errors = store.errors()
        store.close()
        pool.close()
    warm = samples.after(WARM_UP * seconds)
    drift = float(np.polyfit(warm[:, 0], warm[:, 2], 1)[0]) * 3600 / float(warm[0, 2])
    descriptors = sorted({int(count) for count in warm[:, 1]})
    broken = {
        "above the cap": largest > CAPACITY,
        "descriptors": len(descriptors) > 1,
        "wrong blobs": wrong > 0,
        "errors": any(reason != "missing" for _, reason in errors),
    }
    return {
        "operations": operations,
        "restarts": restarts,
        "capacity_bytes": CAPACITY,
        "largest_bytes_on_disk": largest,
        "descriptors": descriptors,
        "resident_bytes": [int(warm[0, 2]), int(warm[-1, 2])],
        "memory_drift_per_hour": round(drift, 5) if seconds >= ENOUGH_SECONDS else None,
        "python_memory_blocks": [int(warm[0, 3]), int(warm[-1, 3])],
        "failures": sum(broken.values()),
        "broken": [name for name, value in broken.items() if value],
        "seconds": round(time.monotonic() - began, 1),
    }


class Samples:
    """Rows (seconds, descriptors, resident bytes, Python's blocks), in memory taken beforehand:

    a list of them would grow by more than what is looked for.
    """

    def __init__(self, seconds: float) -> None:
        self._rows = np.zeros((int(seconds / SAMPLE_SECONDS) + 2, 4))
        self.count = 0

    def take(self, now: float) -> None:
        """Add a row."""
        self._rows[self.count] = (now, disk.open_descriptors(), _resident(), _objects())
        self.count += 1

    def after(self, seconds: float) -> npt.NDArray[np.float64]:
        """The rows from then on."""
        rows = self._rows[: self.count]
        return rows[rows[:, 0] > seconds]


def _open(root: Path) -> DiskStore:
    store = DiskStore(root, NAMESPACE, capacity=CAPACITY, min_free=0)
    store.scan()
    return store


class _Operation:
    """One random call; returns the number of wrong blobs, 0 or 1."""

    def __init__(self, store: DiskStore, key: RecordKey, chance: random.Random) -> None:
        self._store, self._key, self._kind = store, key, chance.random()

    def __call__(self) -> int:
        store, key = self._store, self._key
        try:
            if self._kind < 0.4:
                store.write(key, blob_of(key, longest=LONGEST))
                store.take_evicted()
            elif self._kind < 0.9:
                return store.read(key) != blob_of(key, longest=LONGEST)
            elif self._kind < 0.95:
                store.touch([key])
            else:
                store.remove([key])
        except DiskError as error:
            if error.reason != "missing":
                raise
        return 0


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _objects() -> int:
    """Live blocks of Python's allocator: what our own code would leak."""
    gc.collect()
    return sys.getallocatedblocks()


def main() -> int:
    """Print what was found; exit status 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = run(args.seconds, args.seed)
    print(result)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
