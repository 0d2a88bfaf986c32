"""What keeps blobs by name: memory, disk, and layers over them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from kvtc_vllm.tiers.keys import RecordKey

Blob = bytes | bytearray | memoryview
"""A chunk in the container format; whoever keeps it does not change it."""


class StoreError(Exception):
    """A store did not do what it was asked for: a miss for a read, a dropped store for a write.

    `reason` is a short stable word used as a metric label.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


class BlobStore(Protocol):
    """Blobs of one rank, under a byte cap. Safe for many threads; raises only StoreError."""

    def write(self, key: RecordKey, blob: Blob, tenant: bytes = b"") -> int:
        """Keep a blob under its name.

        tenant: whose it is; a layer that shares bytes shares them within a tenant, and none of
        nobody's. Returns the *marginal* bytes: those that removing it would free. Raises
        StoreError and keeps nothing if there is no room.
        """
        ...

    def read(self, key: RecordKey) -> Blob:
        """The blob. Raises StoreError, "missing" if there is none."""
        ...

    def remove(self, keys: Iterable[RecordKey]) -> int:
        """Forget blobs and return how many there were; unknown names are ignored."""
        ...


class MemoryStore(BlobStore, Protocol):
    """A store that is this process's own: it can be emptied and listed at no cost."""

    def clear(self) -> None:
        """Forget everything."""
        ...

    def keys(self) -> list[RecordKey]:
        """Names of all blobs, oldest first."""
        ...

    def take_resized(self) -> list[tuple[RecordKey, int]]:
        """Blobs whose marginal bytes changed since they were written, with what they are now.

        Those since the last call.
        """
        ...
