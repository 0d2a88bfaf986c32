"""CPU-memory arena of one rank: key -> blob, under a hard byte cap."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from kvtc_vllm.tiers.policies import ChunkKey


class MemoryArena:
    """Blobs of one rank. Safe for the worker's step, encode and load threads.

    The scheduler's index decides what lives here; the cap is a second line of
    defence that holds even if its estimates were wrong.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blobs: dict[ChunkKey, bytes] = {}
        self._used = 0
        self._lock = threading.Lock()

    def put(self, key: ChunkKey, blob: bytes) -> bool:
        """Keep a blob; False (and nothing kept) if it would exceed the cap."""
        with self._lock:
            replaced = len(self._blobs.get(key, b""))
            if self._used - replaced + len(blob) > self.capacity:
                return False
            self._blobs[key] = blob
            self._used += len(blob) - replaced
            return True

    def get(self, key: ChunkKey) -> bytes | None:
        """The blob, or None."""
        with self._lock:
            return self._blobs.get(key)

    def remove(self, keys: Iterable[ChunkKey]) -> None:
        """Forget blobs; unknown keys are ignored."""
        with self._lock:
            for key in keys:
                self._used -= len(self._blobs.pop(key, b""))

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

    def keys(self) -> list[ChunkKey]:
        """Snapshot of the keys, oldest first."""
        with self._lock:
            return list(self._blobs)
