"""What a store policy may ask of the tiers."""

from __future__ import annotations

from collections.abc import Sequence

from kvtc_vllm.tiers.disk_index import DiskIndex
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.keys import ChunkKey, RecordKey, record_keys
from kvtc_vllm.tiers.policies.spare_first import SpareFirst

ROOM = 8
"""One part in so many of the capacity is room that is left."""
ROOM_AGAIN = 2
"""The same after memory was full."""


class TierView:
    """Used by the scheduler's thread only.

    groups: number of cache groups. spare: the order of eviction, if it knows spare records.
    """

    def __init__(
        self,
        memory: TierIndex,
        disk: DiskIndex | None,
        groups: int,
        spare: SpareFirst | None = None,
    ) -> None:
        self._memory = memory
        self._disk = disk
        self._groups = groups
        self._spare = spare
        self._full = False
        self._evictions = memory.evictions

    def has(self, record: RecordKey) -> bool:
        """Whether it can be had, of whatever tier."""
        return self._memory.is_ready(record) or (
            self._disk is not None and self._disk.is_ready(record)
        )

    def not_on_disk(self, records: Sequence[RecordKey]) -> list[RecordKey]:
        """Those that the disk tier lacks; none if there is no disk tier."""
        return [key for key in records if self._disk is not None and not self._disk.is_ready(key)]

    def is_known(self, record: RecordKey) -> bool:
        """Whether memory has it, or is about to."""
        return self._memory.is_known(record)

    def is_waiting(self, chunk: ChunkKey) -> bool:
        """Whether a record of it is being encoded."""
        return any(self._memory.is_pending(key) for key in record_keys([chunk], self._groups))

    def is_on_disk(self, record: RecordKey) -> bool:
        """Whether the disk tier has it."""
        return self._disk is not None and self._disk.is_ready(record)

    def wants_again(self, record: RecordKey) -> None:
        """Keep what memory has of what is not found in the engine's own cache any more."""
        if self._spare is not None:
            self._spare.keep([record])

    @property
    def has_room(self) -> bool:
        """Whether memory holds more without evicting anything.

        Once it had to evict, only when half of it is free: reservations, which are larger than what
        is stored, leave room for moments.
        """
        memory = self._memory
        free = memory.capacity - memory.used
        if memory.evictions > self._evictions or free < memory.capacity // ROOM:
            self._full = True
        elif free >= memory.capacity // ROOM_AGAIN:
            self._full = False
        self._evictions = memory.evictions
        return not self._full
