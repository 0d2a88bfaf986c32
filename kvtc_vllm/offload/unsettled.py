"""What one of several ranks has stored, and the scheduler has not said yet that all have.

Every rank's KV depends on the weights of all. If those of one alone have changed, only its own
report tells. So until all have reported nothing of it may get on disk, under names of the others
that are still theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress

from kvtc_vllm.tiers.blob_store import Blob, BlobStore, MemoryStore, StoreError
from kvtc_vllm.tiers.keys import RecordKey


class Unsettled:
    """Keys of records, with blobs that memory does not keep as they are. Safe for any thread.

    matters: False where there is one rank, or no disk; then nothing is kept. capacity: bytes of
    such blobs; what is beyond must be read from memory.
    """

    def __init__(self, matters: bool, capacity: int) -> None:
        self.matters = matters
        self._capacity = capacity
        self._blobs: dict[RecordKey, Blob | None] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, key: RecordKey, blob: Blob | None) -> None:
        """Take note of a record that this rank has stored. blob: None if memory has it whole."""
        if not self.matters:
            return
        with self._lock:
            self._forget(key)
            size = 0 if blob is None else len(blob)
            if self._bytes + size > self._capacity:
                blob, size = None, 0
            self._blobs[key] = blob
            self._bytes += size

    def held(
        self, keys: Iterable[RecordKey], memory: BlobStore
    ) -> Iterator[tuple[RecordKey, Blob]]:
        """Those of the records that are here or in memory, with their blobs."""
        for key in keys:
            with self._lock:
                blob = self._blobs.get(key)
            with suppress(StoreError):
                yield key, memory.read(key) if blob is None else blob

    def settled_in(self, memory: MemoryStore) -> list[RecordKey]:
        """What memory has and all ranks are known to have stored, newest first."""
        keys = reversed(memory.keys())
        with self._lock:
            return [key for key in keys if key not in self._blobs]

    def forget(self, keys: Iterable[RecordKey]) -> None:
        """These are settled, or given up."""
        with self._lock:
            for key in keys:
                self._forget(key)

    def clear(self) -> None:
        """Their names were given up."""
        with self._lock:
            self._blobs.clear()
            self._bytes = 0

    def _forget(self, key: RecordKey) -> None:
        blob = self._blobs.pop(key, None)
        self._bytes -= 0 if blob is None else len(blob)
