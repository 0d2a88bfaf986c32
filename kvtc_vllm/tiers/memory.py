"""CPU-memory arena of one rank: record -> blob, under a hard byte cap."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from kvtc_vllm.tiers.blob_store import Blob, StoreError
from kvtc_vllm.tiers.keys import RecordKey


class MemoryArena:
    """A `BlobStore`. Safe for the worker's step, encode and load threads.

    The scheduler's index decides what lives here; the cap is a second line of
    defence that holds even if its estimates were wrong. capacity: bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blobs: dict[RecordKey, Blob] = {}
        self._used = 0
        self._lock = threading.Lock()

    def write(self, key: RecordKey, blob: Blob, tenant: bytes = b"") -> int:
        """Keep a blob; returns its bytes. Raises StoreError "full", and keeps nothing."""
        with self._lock:
            used = self._used - len(self._blobs.get(key, b"")) + len(blob)
            if used > self.capacity:
                raise StoreError("full", f"{used} bytes would exceed {self.capacity}")
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
            blob = self._blobs.get(key)
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
                    self._used -= len(blob)
                    removed += 1
        return removed

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._blobs.clear()
            self._used = 0

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
            return list(self._blobs)

    def take_resized(self) -> list[tuple[RecordKey, int]]:
        """None: nothing is shared."""
        return []
