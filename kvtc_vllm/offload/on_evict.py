"""Stores a record when the engine's own cache is about to give it up, and not before.

Until then the engine finds it there, and the tier has no need of it. Records whose blocks come
next are stored a few steps ahead, so that a step never copies more than it must; what a step
takes all the same is copied before that step's forward, while its blocks still hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvtc_vllm.offload.gpu_records import GpuRecord, GpuRecords
from kvtc_vllm.offload.horizon import Horizon
from kvtc_vllm.offload.messages import NO_ADAPTER
from kvtc_vllm.offload.pool_watch import watch_pool
from kvtc_vllm.offload.store_policy import Candidate, Storable
from kvtc_vllm.offload.tier_view import TierView
from kvtc_vllm.offload.vllm_types import BlockPool
from kvtc_vllm.tiers.keys import ChunkKey, RecordKey, record_key


@dataclass(frozen=True)
class BlockReuse:
    """What this engine does with its blocks."""

    step_blocks: int
    """Most blocks that the tokens of one step can take, over all cache groups."""
    zeroes: bool = False
    """It may clear the blocks that a step takes before the connector is called."""
    sleeps: bool = False
    """It may let go of the memory after a reset."""


class OnEvict:
    """A `StorePolicy`. Until `bind`, and for what vLLM can't tell evictions of, it stores at once.

    horizon: free blocks to look ahead; None for as many as coming steps may take. count: adds to
    a counter of ours, with a label if it has any.
    """

    watches = True

    def __init__(
        self,
        tier: TierView,
        reuse: BlockReuse,
        horizon: int | None,
        count: Callable[[str, int, str | None], None],
    ) -> None:
        self._tier = tier
        self._reuse = reuse
        self._horizon = Horizon(horizon, reuse.step_blocks, reuse.zeroes)
        self._count = count
        self._gpu: GpuRecords | None = None
        self._loaded: dict[str, set[ChunkKey]] = {}
        self._kept: list[Candidate] = []
        # Stored ahead since a block was handed out. Where memory is smaller than the horizon they
        # evict each other, and an idle engine would store them for ever.
        self._ahead: set[RecordKey] = set()

    def bind(self, pool: BlockPool) -> None:
        gpu = GpuRecords(pool)
        if watch_pool(pool, gpu):
            self._gpu = gpu

    def completed(self, chunks: Sequence[Candidate]) -> Sequence[Candidate]:
        at_once = []
        for chunk in chunks:
            not_followed = [list[int]() for _ in chunk.block_ids]
            for group, part in _by_record(chunk):
                record = record_key(chunk.key, group)
                new = self._gpu is None or record not in self._gpu
                if not self._follow(part, group):
                    not_followed[group] = part.block_ids[group]
                elif new and not self._tier.is_known(record):
                    self._kept.append(part)
            if any(not_followed):
                at_once.append(chunk._replace(block_ids=tuple(not_followed)))
        return at_once

    def follow(self, chunk: Candidate) -> None:
        """Have what can be followed of it stored when its blocks are reused, if missing then."""
        for group, part in _by_record(chunk):
            self._follow(part, group)

    def _follow(self, part: Candidate, group: int) -> bool:
        """False if nothing would tell when the blocks of this record are reused."""
        # An adapter may leave its slot before its chunks leave the cache, and could not be
        # compared with what computed them then.
        if self._gpu is None or part.adapter != NO_ADAPTER:
            return False
        key, start, blocks = part.key, part.start, part.block_ids
        decoded = key in self._loaded.get(part.request.request_id, ())
        return self._gpu.follow(key, start, blocks, decoded, part.tenant, part.tokens, group)

    def due(self) -> Sequence[Storable]:
        gpu = self._gpu
        if gpu is None:
            return ()
        handed_out = gpu.take_handed_out()
        self._horizon.step_took(handed_out)
        if handed_out:
            self._ahead.clear()
        at_last = gpu.take_given_up()
        if self._reuse.zeroes:
            self._lose(at_last)
            at_last = []
        after_reset = gpu.take_after_reset()
        if self._reuse.zeroes or self._reuse.sleeps:
            self._lose(after_reset)
            after_reset = []
        for record in at_last:
            self._tier.wants_again(record.record)
        late = self._missing([*at_last, *after_reset])
        if late:
            self._count("late_stores", len(late), None)
        soon = self._missing(gpu.next_to_go(self._horizon.blocks))
        ahead = [record for record in soon if record.record not in self._ahead]
        self._ahead.update(record.record for record in ahead)
        self._lose(gpu.take_overwritten())
        again = sum(record.decoded for record in (*late, *ahead))
        if again:
            self._count("reencoded_chunks", again, None)
        return [*late, *ahead]

    def loaded(self, request_id: str, chunks: Iterable[ChunkKey]) -> None:
        self._loaded.setdefault(request_id, set()).update(chunks)

    def take_kept(self) -> Sequence[Storable]:
        kept, self._kept = self._kept, []
        return kept

    def take_gone(self) -> Sequence[RecordKey]:
        return self._gpu.take_gone() if self._gpu is not None else ()

    def forget(self, request_id: str) -> None:
        self._loaded.pop(request_id, None)

    def clear(self) -> None:
        self._kept.clear()
        self._loaded.clear()
        self._ahead.clear()
        if self._gpu is not None:
            self._gpu.clear()

    def _missing(self, records: Iterable[GpuRecord]) -> list[GpuRecord]:
        """Those that no tier has, heads of prefixes first: a tail without its head is of no use."""
        known, on_disk = self._tier.is_known, self._tier.is_on_disk
        missing = [r for r in records if not (known(r.record) or on_disk(r.record))]
        return sorted(missing, key=lambda record: record.start)

    def _lose(self, records: Sequence[GpuRecord]) -> None:
        """Count those that no tier has and that can't be copied any more."""
        lost = len(self._missing(records))
        if lost:
            self._count("dropped_stores", lost, "overwritten")


def _by_record(chunk: Candidate) -> Iterator[tuple[int, Candidate]]:
    """Its records that are to be stored: number of the cache group, and the chunk with it alone."""
    for group, blocks in enumerate(chunk.block_ids):
        if blocks:
            alone = tuple(blocks if n == group else [] for n in range(len(chunk.block_ids)))
            yield group, chunk._replace(block_ids=alone)
