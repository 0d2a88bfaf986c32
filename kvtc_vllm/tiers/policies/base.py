"""The eviction policy interface."""

from __future__ import annotations

from typing import Protocol

from kvtc_vllm.tiers.keys import RecordKey


class EvictionPolicy(Protocol):
    """Order in which resident records are given up.

    Used by one thread (the scheduler's). The policy tracks keys and sizes; the
    index owns the bytes. Every call takes constant time, however many records there are and
    however many of them are held.
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

    def hold(self, key: RecordKey) -> None:
        """Do not evict a record until it is released. Unknown keys are ignored."""
        ...

    def release(self, key: RecordKey) -> None:
        """End `hold`; the record is then the most recent of its class."""
        ...

    def remove(self, key: RecordKey) -> None:
        """Drop a record that left for another reason than eviction. Unknown keys are ignored."""
        ...

    def evict(self) -> RecordKey | None:
        """Choose, forget and return the next victim, or None if all are held."""
        ...

    def clear(self) -> None:
        """Forget everything, history included."""
        ...
