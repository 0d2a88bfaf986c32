"""Stores a chunk when the engine's own cache is about to give it up, and not before.

Until then the engine finds it there, and the tier has no need of it. Chunks whose blocks come
next are stored a few steps ahead, so that a step never copies more than it must; what a step
takes all the same is copied before that step's forward, while its blocks still hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvtc_vllm.offload.gpu_chunks import GpuChunk, GpuChunks
from kvtc_vllm.offload.horizon import Horizon
from kvtc_vllm.offload.messages import NO_ADAPTER
from kvtc_vllm.offload.pool_watch import watch_pool
from kvtc_vllm.offload.store_policy import Candidate, Storable
from kvtc_vllm.offload.tier_view import TierView
from kvtc_vllm.offload.vllm_types import BlockPool
from kvtc_vllm.tiers.keys import ChunkKey


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
        self._gpu: GpuChunks | None = None
        self._loaded: dict[str, set[ChunkKey]] = {}
        self._kept: list[Candidate] = []

    def bind(self, pool: BlockPool) -> None:
        gpu = GpuChunks(pool)
        if watch_pool(pool, gpu):
            self._gpu = gpu

    def completed(self, chunks: Sequence[Candidate]) -> Sequence[Candidate]:
        at_once = []
        for chunk in chunks:
            new = self._gpu is None or chunk.key not in self._gpu
            if not self.follow(chunk):
                at_once.append(chunk)
            elif new and not chunk.stored:
                self._kept.append(chunk)
        return at_once

    def follow(self, chunk: Candidate) -> bool:
        """Have it stored when its blocks are reused, if it is missing then.

        False if nothing would tell.
        """
        # An adapter may leave its slot before its chunks leave the cache, and could not be
        # compared with what computed them then.
        if self._gpu is None or chunk.adapter != NO_ADAPTER:
            return False
        decoded = chunk.key in self._loaded.get(chunk.request.request_id, ())
        return self._gpu.follow(
            chunk.key, chunk.start, chunk.block_ids, decoded, chunk.tenant, chunk.tokens
        )

    def due(self) -> Sequence[Storable]:
        gpu = self._gpu
        if gpu is None:
            return ()
        self._horizon.step_took(gpu.take_handed_out())
        at_last = gpu.take_given_up()
        if self._reuse.zeroes:
            self._lose(at_last)
            at_last = []
        after_reset = gpu.take_after_reset()
        if self._reuse.zeroes or self._reuse.sleeps:
            self._lose(after_reset)
            after_reset = []
        for chunk in at_last:
            self._tier.wants_again(chunk.key)
        late = self._missing([*at_last, *after_reset])
        if late:
            self._count("late_stores", len(late), None)
        ahead = self._missing(gpu.next_to_go(self._horizon.blocks))
        self._lose(gpu.take_overwritten())
        again = sum(chunk.decoded for chunk in (*late, *ahead))
        if again:
            self._count("reencoded_chunks", again, None)
        return [*late, *ahead]

    def loaded(self, request_id: str, chunks: Iterable[ChunkKey]) -> None:
        self._loaded.setdefault(request_id, set()).update(chunks)

    def take_kept(self) -> Sequence[Storable]:
        kept, self._kept = self._kept, []
        return kept

    def take_gone(self) -> Sequence[ChunkKey]:
        return self._gpu.take_gone() if self._gpu is not None else ()

    def forget(self, request_id: str) -> None:
        self._loaded.pop(request_id, None)

    def clear(self) -> None:
        self._kept.clear()
        self._loaded.clear()
        if self._gpu is not None:
            self._gpu.clear()

    def _missing(self, chunks: Iterable[GpuChunk]) -> list[GpuChunk]:
        """Those that no tier has, heads of prefixes first: a tail without its head is of no use."""
        found = list(chunks)
        known = self._tier.known([chunk.key for chunk in found])
        missing = [c for c in found if c.key not in known and not self._tier.is_on_disk(c.key)]
        return sorted(missing, key=lambda chunk: chunk.start)

    def _lose(self, chunks: Sequence[GpuChunk]) -> None:
        """Count those that no tier has and that can't be copied any more."""
        lost = len(self._missing(chunks))
        if lost:
            self._count("dropped_stores", lost, "overwritten")
