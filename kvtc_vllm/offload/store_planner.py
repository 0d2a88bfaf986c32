"""Cuts what a step computes into chunks, and plans the stores of those that the policy chooses."""

from __future__ import annotations

from collections.abc import Sequence

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.geometry import CacheGeometry, blocks_per_chunk
from kvtc_vllm.offload.keys import chunk_keys
from kvtc_vllm.offload.messages import StoreItem
from kvtc_vllm.offload.requests import RequestState
from kvtc_vllm.offload.store_policy import Candidate, StorePolicy
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.keys import ChunkKey, record_keys


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
        known = self._known(keys)
        of_groups = list(zip(tables, self._per_chunk, strict=True))
        unknown = [
            Candidate(
                key,
                request,
                n * length,
                (n + 1) * length,
                tuple([table[n * size : (n + 1) * size] for table, size in of_groups]),
                adapter,
            )
            for n, key in zip(numbers, keys, strict=True)
            if key not in known
        ]
        state.next_chunk = max(state.next_chunk, complete)
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
        self, state: RequestState, tables: Sequence[list[int]], computed_tokens: int
    ) -> int:
        # Hashes exist for confirmed tokens only, so speculative ones never count.
        hashed = min(computed_tokens // self._block_size, len(state.request.block_hashes))
        complete = hashed // self._hashes_per_chunk
        for table, blocks in zip(tables, self._per_chunk, strict=True):
            complete = min(complete, len(table) // blocks)
        return complete

    def _known(self, chunks: Sequence[ChunkKey]) -> set[ChunkKey]:
        """Those of which the index knows every record."""
        groups, is_known = len(self._per_chunk), self._index.is_known
        known = [is_known(record) for record in record_keys(chunks, groups)]
        return {key for n, key in enumerate(chunks) if all(known[n * groups : (n + 1) * groups])}

    def _reserve(self, chunks: Sequence[Candidate]) -> list[StoreItem]:
        """Stores of records for which there is room; the index knows them from now on."""
        stores = []
        keys = iter(record_keys([chunk.key for chunk in chunks], len(self._per_chunk)))
        reserve, bounds = self._index.reserve, self._bounds
        for chunk in chunks:
            for group, block_ids in enumerate(chunk.block_ids):
                key = next(keys)
                if reserve(key, bounds[group]):
                    stores.append(StoreItem(key, chunk.start, block_ids, chunk.adapter, group))
        return stores
