"""The eviction policy interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

ChunkKey = bytes
"""Hash of a chunk's last block; it covers the whole prefix and so the position."""


class EvictionPolicy(Protocol):
    """Order in which resident chunks are given up.

    Used by one thread (the scheduler's). The policy tracks keys and sizes; the
    index owns the bytes.
    """

    name: str

    def insert(self, key: ChunkKey, size: int) -> None:
        """Track a chunk of `size` bytes that became resident."""
        ...

    def hit(self, key: ChunkKey) -> None:
        """Count a use of a resident chunk. Unknown keys are ignored."""
        ...

    def refresh(self, key: ChunkKey) -> None:
        """Make a resident chunk the most recent of its class without counting a use."""
        ...

    def remove(self, key: ChunkKey) -> None:
        """Drop a chunk that left for another reason than eviction. Unknown keys are ignored."""
        ...

    def evict(self, evictable: Callable[[ChunkKey], bool]) -> ChunkKey | None:
        """Choose, forget and return the next victim, or None if nothing qualifies."""
        ...

    def clear(self) -> None:
        """Forget everything, history included."""
        ...
