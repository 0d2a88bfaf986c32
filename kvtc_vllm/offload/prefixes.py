"""Prefixes that the engine's own cache finds whole or not at all.

A window or a state is kept where a request may go on, at the end of a prefix. Once a block before
that is gone, the engine goes on nowhere, and what it still holds of the prefix is found by nobody.
So all that leads to a record which is given up is stored with it: then the tier has a restore
point, and the engine's cache need not be one any more.
"""

from __future__ import annotations

from collections.abc import Callable

from kvtc_vllm.offload.gpu_records import GpuRecord, GpuRecords
from kvtc_vllm.tiers.keys import ChunkKey, RecordKey, record_key


class Prefixes:
    """Used by the scheduler's thread only. groups: cache groups of the model."""

    def __init__(self, records: GpuRecords, groups: int) -> None:
        self._records = records
        self._groups = groups
        # Chunks whose records are to be taken; of a prefix the head first.
        self._waiting: dict[ChunkKey, None] = {}
        # Chunks that were put there with all before them, as long as the first group's record of
        # them is followed; it has the chunk's key.
        self._lost: set[RecordKey] = set()

    def used(self, chunk: ChunkKey) -> None:
        """Note that a request goes on behind a chunk, which the engine's cache holds."""
        self._lost.discard(record_key(chunk, 0))

    def lose(self, record: GpuRecord) -> None:
        """Note that a record is given up, or will be soon."""
        chain, found = [record.key], record
        while found.before is not None:
            before = record_key(found.before, 0)
            first = self._records.get(before)
            if first is None or before in self._lost:
                break
            self._lost.add(before)
            chain.append(first.key)
            found = first
        self._waiting.update(dict.fromkeys(reversed(chain)))

    def take(self, blocks: int, is_missing: Callable[[RecordKey], bool]) -> list[GpuRecord]:
        """The next of what leads to such records and is still held, with all of a chunk at once.

        blocks: about so many of those that are missing. Never takes a record whose blocks hold
        something else.
        """
        taken = []
        while self._waiting and blocks > 0:
            chunk = next(iter(self._waiting))
            del self._waiting[chunk]
            for group in range(self._groups):
                found = self._records.held(record_key(chunk, group))
                if found is not None:
                    taken.append(found)
                    blocks -= len(found.hashes) if is_missing(found.record) else 0
        return taken

    def forget(self, gone: list[RecordKey]) -> None:
        """Note that these records are followed no longer."""
        self._lost.difference_update(gone)

    def clear(self) -> None:
        """Follow nothing any more."""
        self._waiting.clear()
        self._lost.clear()
