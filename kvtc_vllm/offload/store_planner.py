"""Cuts what a step computes into chunks, and plans the stores of those that the policy chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.geometry import CacheGeometry
from kvtc_vllm.offload.keys import chunk_keys, tenant_of, token_bytes
from kvtc_vllm.offload.messages import StoreItem
from kvtc_vllm.offload.requests import RequestState
from kvtc_vllm.offload.restore_points import RestorePoints
from kvtc_vllm.offload.store_policy import Candidate, Storable, StorePolicy
from kvtc_vllm.offload.tier_view import TierView
from kvtc_vllm.offload.vllm_types import BlockPool
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.keys import ChunkKey, RecordKey, record_key


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
        self._restore_points = RestorePoints(config, geometry)
        self._wants_tokens = config.joint == "delta"
        self._hashes_per_chunk = config.chunk_tokens // geometry.hash_tokens

    def completed(
        self,
        state: RequestState,
        tables: Sequence[Sequence[int]],
        computed_before: int,
        computed_tokens: int,
    ) -> list[StoreItem]:
        """Stores of the chunks that this step completes.

        tables: the request's block ids by block table. computed_before, computed_tokens: of the
        request, before and after this step.
        """
        if state.tainted or state.adapter is None:
            return []  # once workers have told the adapter, all chunks so far are stored
        request, adapter, length = state.request, state.adapter, self._chunk_tokens
        complete = self._complete_chunks(state, tables, computed_tokens)
        numbers = range(state.next_chunk, complete)
        keys = chunk_keys(request, self._hashes_per_chunk, adapter.digest, numbers.start, complete)
        tenant, watches = tenant_of(request), self._policy.watches
        chunks = []
        for n, key in zip(numbers, keys, strict=True):
            wanted = self._restore_points.wanted(state, n, computed_before, computed_tokens)
            known = self._are_known(key, wanted)
            if known and not watches:
                continue
            blocks = self._restore_points.blocks(tables, n, wanted)
            start, end = n * length, (n + 1) * length
            tokens = token_bytes(request, start, end) if self._wants_tokens else b""
            chunks.append(
                Candidate(key, request, start, end, blocks, adapter, tenant, known, tokens)
            )
        state.next_chunk = max(state.next_chunk, complete)
        if not chunks:
            return []
        stores = self._reserve(self._items(self._policy.completed(chunks)))
        self._release_passed(state, stores, complete)
        return stores

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
        return self._policy.take_gone()

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

    def _release_passed(
        self, state: RequestState, stores: Sequence[StoreItem], complete: int
    ) -> None:
        """Give up records of an answer that has gone on: nobody will end where they are needed."""
        points = self._restore_points
        if points.keep_all:
            return
        state.passing += [s for s in stores if points.is_passing(s.group, s.start, state)]
        passed = [s for s in state.passing if points.is_passed(s.group, s.start, complete)]
        for store in passed:
            self._index.discard(store.key)
            state.passing.remove(store)

    def _complete_chunks(
        self, state: RequestState, tables: Sequence[Sequence[int]], computed_tokens: int
    ) -> int:
        # Hashes exist for confirmed tokens only, so speculative ones never count.
        hashed = len(state.request.block_hashes) // self._hashes_per_chunk
        complete = min(computed_tokens // self._chunk_tokens, hashed)
        return self._restore_points.complete(tables, complete)

    def _are_known(self, chunk: ChunkKey, groups: Sequence[int]) -> bool:
        """Whether the index knows a chunk's records of these groups."""
        return all(map(self._index.is_known, [record_key(chunk, group) for group in groups]))

    def _items(self, chunks: Sequence[Storable]) -> list[StoreItem]:
        """One per record that is to be stored."""
        return [
            StoreItem(
                record_key(chunk.key, group),
                chunk.start,
                block_ids,
                chunk.adapter,
                group,
                chunk.tenant,
                chunk.tokens,
            )
            for chunk in chunks
            for group, block_ids in enumerate(chunk.block_ids)
            if block_ids
        ]

    def _reserve(self, items: Sequence[StoreItem]) -> list[StoreItem]:
        """Those for which there is room; the index knows them from now on."""
        reserve, bounds = self._index.reserve, self._bounds
        return [item for item in items if reserve(item.key, bounds[item.group])]
