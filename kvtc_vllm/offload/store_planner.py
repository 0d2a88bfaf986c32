"""Cuts what a step computes into chunks, and plans the stores of those that the policy chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.geometry import CacheGeometry, blocks_per_chunk
from kvtc_vllm.offload.keys import chunk_keys, tenant_of
from kvtc_vllm.offload.messages import StoreItem
from kvtc_vllm.offload.requests import RequestState
from kvtc_vllm.offload.store_policy import Candidate, Storable, StorePolicy
from kvtc_vllm.offload.tier_view import TierView
from kvtc_vllm.offload.vllm_types import BlockPool
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.keys import ChunkKey, RecordKey, record_keys


class StorePlanner:
    """Used by the scheduler's thread only.

    bounds: by cache group, most bytes of a record on any rank. no_room: called for records that
    were due and found no room. Raises ConfigError if chunks are not whole blocks.
    """

    def __init__(
        self,
        config: KVTCConfig,
        geometry: CacheGeometry,
        bounds: Sequence[int],
        index: TierIndex,
        tier: TierView,
        policy: StorePolicy,
        no_room: Callable[[int], None] = lambda records: None,
    ) -> None:
        self._chunk_tokens = config.chunk_tokens
        self._bounds = bounds
        self._index = index
        self._tier = tier
        self._policy = policy
        self._no_room = no_room
        self._late: dict[RecordKey, int] = {}
        # vLLM hashes blocks of the first group.
        self._block_size = geometry.groups[0].block_size
        self._per_chunk = [blocks_per_chunk(config, group) for group in geometry.groups]
        self._hashes_per_chunk = self._per_chunk[0]

    def completed(
        self, state: RequestState, tables: Sequence[list[int]], computed_tokens: int
    ) -> list[StoreItem]:
        """Stores of the chunks that this step completes.

        tables: the request's block ids by cache group. computed_tokens: of the request, after
        this step.
        """
        if state.tainted or state.adapter is None:
            return []  # once workers have told the adapter, all chunks so far are stored
        request, adapter, length = state.request, state.adapter, self._chunk_tokens
        complete = self._complete_chunks(state, tables, computed_tokens)
        numbers = range(state.next_chunk, complete)
        keys = chunk_keys(request, self._hashes_per_chunk, adapter.digest, numbers.start, complete)
        known, watches = self._tier.known(keys), self._policy.watches
        tenant = tenant_of(request)
        of_groups = list(zip(tables, self._per_chunk, strict=True))
        chunks = [
            Candidate(
                key,
                request,
                n * length,
                (n + 1) * length,
                tuple([table[n * size : (n + 1) * size] for table, size in of_groups]),
                adapter,
                tenant,
                key in known,
            )
            for n, key in zip(numbers, keys, strict=True)
            if watches or key not in known
        ]
        state.next_chunk = max(state.next_chunk, complete)
        return self._reserve(self._items(self._policy.completed(chunks))) if chunks else []

    def due(self) -> list[StoreItem]:
        """Stores of chunks of earlier steps, to be staged before this step's forward."""
        due = self._items(self._policy.due())
        stores = self._reserve(due)
        unknown = sum(not self._index.is_known(item.key) for item in due)
        if unknown:
            self._no_room(unknown)
        self._late.update((item.key, item.start) for item in stores)
        return stores

    def take_kept(self) -> list[StoreItem]:
        """Stores that were put off in this step, until their blocks are about to be reused."""
        return self._items(self._policy.take_kept())

    def take_gone(self) -> Sequence[RecordKey]:
        """Records that the engine's own cache holds no longer than until this step."""
        return record_keys(self._policy.take_gone(), len(self._per_chunk))

    def settled(self, keys: Iterable[RecordKey]) -> None:
        """Note that these records are stored, or given up.

        Parts of one prefix may come in any order and over many steps; heads are to be evicted
        last.
        """
        late = {key: self._late.pop(key) for key in keys if key in self._late}
        self._index.refresh(sorted(late, key=late.__getitem__))

    def bind(self, pool: BlockPool) -> None:
        """Give the policy vLLM's pool of blocks."""
        self._policy.bind(pool)

    def loaded(self, request_id: str, chunks: Iterable[ChunkKey]) -> None:
        """Note that these chunks of a request come out of the tier."""
        self._policy.loaded(request_id, chunks)

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that ended."""
        self._policy.forget(request_id)

    def clear(self) -> None:
        """Drop what is kept for later: all names were given up."""
        self._late.clear()
        self._policy.clear()

    def _complete_chunks(
        self, state: RequestState, tables: Sequence[list[int]], computed_tokens: int
    ) -> int:
        # Hashes exist for confirmed tokens only, so speculative ones never count.
        hashed = min(computed_tokens // self._block_size, len(state.request.block_hashes))
        complete = hashed // self._hashes_per_chunk
        for table, blocks in zip(tables, self._per_chunk, strict=True):
            complete = min(complete, len(table) // blocks)
        return complete

    def _items(self, chunks: Sequence[Storable]) -> list[StoreItem]:
        """One per record."""
        keys = iter(record_keys([chunk.key for chunk in chunks], len(self._per_chunk)))
        return [
            StoreItem(next(keys), chunk.start, block_ids, chunk.adapter, group, chunk.tenant)
            for chunk in chunks
            for group, block_ids in enumerate(chunk.block_ids)
        ]

    def _reserve(self, items: Sequence[StoreItem]) -> list[StoreItem]:
        """Those for which there is room; the index knows them from now on."""
        reserve, bounds = self._index.reserve, self._bounds
        return [item for item in items if reserve(item.key, bounds[item.group])]
