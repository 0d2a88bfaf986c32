"""CPU-memory arena of one rank: record -> blob, under a hard byte cap."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from kvtc_vllm.tiers.blob_store import Blob, StoreError
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.sharded_dict import PAUSE_SECONDS, ShardedDict

FREED_AT_ONCE = 64
"""Blobs: of tens of KB each, some hundredths of a millisecond."""


class MemoryArena:
    """A `BlobStore`. Safe for the worker's step, encode and load threads.

    The scheduler's index decides what lives here; the cap is a second line of
    defence that holds even if its estimates were wrong. capacity: bytes. What is cleared is freed
    by a thread bit by bit, and sooner where its bytes are needed: it takes seconds for 64 GiB.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blobs: ShardedDict[Blob] = ShardedDict()
        self._numbers: ShardedDict[int] = ShardedDict()  # by which `keys` are in order
        self._next = 0
        self._used = 0
        self._cleared: list[dict[bytes, Blob]] = []
        self._cleared_bytes = 0
        self._lock = threading.Lock()

    def write(self, key: RecordKey, blob: Blob, tenant: bytes = b"") -> int:
        """Keep a blob; returns its bytes. Raises StoreError "full", and keeps nothing."""
        with self._lock:
            used = self._used - len(self._blobs.get(key, b"")) + len(blob)
            if used > self.capacity:
                raise StoreError("full", f"{used} bytes would exceed {self.capacity}")
            while self._cleared and used + self._cleared_bytes > self.capacity:
                self._free_some()
            if key not in self._blobs:
                self._numbers[key] = self._next
                self._next += 1
            self._blobs[key] = blob
            self._used = used
            return len(blob)

    def replace(self, key: RecordKey, old: Blob, new: Blob) -> bool:
        """Keep another, smaller blob under a name, if it still is that of `old`."""
        with self._lock:
            if self._blobs.get(key) is not old or len(new) >= len(old):
                return False
            self._blobs[key] = new
            self._used -= len(old) - len(new)
            return True

    def read(self, key: RecordKey) -> Blob:
        """The blob. Raises StoreError "missing"."""
        with self._lock:
            blob: Blob | None = self._blobs.get(key)
        if blob is None:
            raise StoreError("missing", "the record is not in memory")
        return blob

    def remove(self, keys: Iterable[RecordKey]) -> int:
        """Forget blobs and return how many there were; unknown names are ignored."""
        removed = 0
        with self._lock:
            for key in keys:
                blob = self._blobs.pop(key, None)
                if blob is not None:
                    del self._numbers[key]
                    self._used -= len(blob)
                    removed += 1
        return removed

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            freeing = bool(self._cleared)
            self._cleared += [shard for shard in self._blobs.take_all() if shard]
            self._cleared_bytes += self._used
            self._numbers.clear()
            self._used = 0
            if self._cleared and not freeing:
                threading.Thread(target=self._free, name="kvtc-free", daemon=True).start()

    @property
    def used(self) -> int:
        """Bytes held."""
        with self._lock:
            return self._used

    def __len__(self) -> int:
        with self._lock:
            return len(self._blobs)

    def keys(self) -> list[RecordKey]:
        """Snapshot of the keys, oldest first."""
        with self._lock:
            numbered = [(number, key) for key, number in self._numbers.items()]
        return [RecordKey(key) for _, key in sorted(numbered)]

    def take_resized(self) -> list[tuple[RecordKey, int]]:
        """None: nothing is shared."""
        return []

    def _free(self) -> None:
        while True:
            with self._lock:
                if not self._cleared:
                    return
                self._free_some()
            time.sleep(PAUSE_SECONDS)

    def _free_some(self) -> None:
        shard = self._cleared[-1]
        for _ in range(min(FREED_AT_ONCE, len(shard))):
            self._cleared_bytes -= len(shard.popitem()[1])
        if not shard:
            self._cleared.pop()
