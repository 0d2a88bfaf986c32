"""Cuts what a step computes into chunks, and plans the stores of those that the policy chooses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.geometry import CacheGeometry, blocks_per_chunk
from kvtc_vllm.offload.keys import chunk_key
from kvtc_vllm.offload.messages import StoreItem
from kvtc_vllm.offload.requests import RequestState
from kvtc_vllm.offload.store_policy import Candidate, StorePolicy
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.keys import ChunkKey, record_key


class StorePlanner:
    """Used by the scheduler's thread only.

    bounds: by cache group, most bytes of a record on any rank. Raises ConfigError if chunks are
    not whole blocks.
    """

    def __init__(
        self,
        config: KVTCConfig,
        geometry: CacheGeometry,
        bounds: Sequence[int],
        index: TierIndex,
        policy: StorePolicy,
    ) -> None:
        self._chunk_tokens = config.chunk_tokens
        self._bounds = bounds
        self._index = index
        self._policy = policy
        # vLLM hashes blocks of the first group.
        self._block_size = geometry.groups[0].block_size
        self._per_chunk = [blocks_per_chunk(config, group) for group in geometry.groups]
        self._hashes_per_chunk = self._per_chunk[0]

    def completed(
        self, state: RequestState, tables: Sequence[Sequence[int]], computed_tokens: int
    ) -> list[StoreItem]:
        """Stores of the chunks that this step completes.

        tables: the request's block ids by cache group. computed_tokens: of the request, after
        this step.
        """
        if computed_tokens < (state.next_chunk + 1) * self._chunk_tokens:
            return []  # as in nearly every step that generates
        if state.tainted or state.adapter is None:
            return []  # once workers have told the adapter, all chunks so far are stored
        complete = self._complete_chunks(state, tables, computed_tokens)
        chunks = range(state.next_chunk, complete)
        state.next_chunk = max(state.next_chunk, complete)
        candidates = (self._candidate(state, tables, chunk) for chunk in chunks)
        unknown = [chunk for chunk in candidates if not self._is_known(chunk.key)]
        return self._reserve(self._policy.completed(unknown)) if unknown else []

    def due(self) -> list[StoreItem]:
        """Stores of chunks of earlier steps, to be staged before this step's forward."""
        return self._reserve(self._policy.due())

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that ended."""
        self._policy.forget(request_id)

    def clear(self) -> None:
        """Drop what is kept for later: all names were given up."""
        self._policy.clear()

    def _complete_chunks(
        self, state: RequestState, tables: Sequence[Sequence[int]], computed_tokens: int
    ) -> int:
        # Hashes exist for confirmed tokens only, so speculative ones never count.
        hashed = min(computed_tokens // self._block_size, len(state.request.block_hashes))
        complete = hashed // self._hashes_per_chunk
        for table, blocks in zip(tables, self._per_chunk, strict=True):
            complete = min(complete, len(table) // blocks)
        return complete

    def _candidate(
        self, state: RequestState, tables: Sequence[Sequence[int]], chunk: int
    ) -> Candidate:
        assert state.adapter is not None
        start = chunk * self._chunk_tokens
        return Candidate(
            key=chunk_key(state.request, self._hashes_per_chunk, chunk, state.adapter.digest),
            request=state.request,
            start=start,
            end=start + self._chunk_tokens,
            block_ids=tuple(
                list(table[chunk * blocks : (chunk + 1) * blocks])
                for table, blocks in zip(tables, self._per_chunk, strict=True)
            ),
            adapter=state.adapter,
        )

    def _is_known(self, chunk: ChunkKey) -> bool:
        groups = range(len(self._per_chunk))
        return all(self._index.is_known(record_key(chunk, group)) for group in groups)

    def _reserve(self, chunks: Iterable[Candidate]) -> list[StoreItem]:
        """Stores of records for which there is room; the index knows them from now on."""
        stores = []
        for chunk in chunks:
            for group, block_ids in enumerate(chunk.block_ids):
                key = record_key(chunk.key, group)
                if self._index.reserve(key, self._bounds[group]):
                    stores.append(StoreItem(key, chunk.start, block_ids, chunk.adapter, group))
        return stores
