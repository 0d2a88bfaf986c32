"""What a store policy may ask of the tiers, chunk by chunk over all cache groups."""

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

    def known(self, chunks: Sequence[ChunkKey]) -> set[ChunkKey]:
        """Those of which memory has every record, or is about to."""
        groups, is_known = self._groups, self._memory.is_known
        known = [is_known(record) for record in record_keys(chunks, groups)]
        return {key for n, key in enumerate(chunks) if all(known[n * groups : (n + 1) * groups])}

    def is_waiting(self, chunk: ChunkKey) -> bool:
        """Whether a record of it is being encoded."""
        return any(self._memory.is_pending(key) for key in record_keys([chunk], self._groups))

    def is_on_disk(self, chunk: ChunkKey) -> bool:
        """Whether every record of it is on disk."""
        if self._disk is None:
            return False
        return all(self._disk.is_ready(key) for key in record_keys([chunk], self._groups))

    def wants_again(self, chunk: ChunkKey) -> None:
        """Keep what memory has of a chunk that the engine's own cache has given up."""
        if self._spare is not None:
            self._spare.keep(reversed(record_keys([chunk], self._groups)))

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
