"""The eviction policy interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvtc_vllm.tiers.keys import RecordKey


class EvictionPolicy(Protocol):
    """Order in which resident records are given up.

    Used by one thread (the scheduler's). The policy tracks keys and sizes; the
    index owns the bytes.
    """

    name: str

    def insert(self, key: RecordKey, size: int) -> None:
        """Track a record of `size` bytes that became resident."""
        ...

    def hit(self, key: RecordKey) -> None:
        """Count a use of a resident record. Unknown keys are ignored."""
        ...

    def refresh(self, key: RecordKey) -> None:
        """Make a resident record the most recent of its class without counting a use."""
        ...

    def remove(self, key: RecordKey) -> None:
        """Drop a record that left for another reason than eviction. Unknown keys are ignored."""
        ...

    def evict(self, evictable: Callable[[RecordKey], bool]) -> RecordKey | None:
        """Choose, forget and return the next victim, or None if nothing qualifies."""
        ...

    def clear(self) -> None:
        """Forget everything, history included."""
        ...
