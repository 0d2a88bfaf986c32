"""What a hit is: which records a prefix consists of, and which blocks they fill."""

from __future__ import annotations

from collections.abc import Sequence

from kvtc_vllm.offload.geometry import CacheGeometry
from kvtc_vllm.offload.keys import chunk_keys
from kvtc_vllm.offload.messages import AdapterUse, LoadItem
from kvtc_vllm.offload.vllm_types import Request
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.keys import ChunkKey, RecordKey, record_key


class PrefixLookup:
    """Chunks of a request and their records. Used by the scheduler's thread only."""

    def __init__(self, chunk_tokens: int, geometry: CacheGeometry, index: TierIndex) -> None:
        self._chunk_tokens = chunk_tokens
        self._index = index
        self._groups = geometry.groups
        # vLLM hashes blocks of the first group.
        self._hashes_per_chunk = chunk_tokens // geometry.groups[0].block_size

    def chunks(self, request: Request, adapter: AdapterUse) -> list[ChunkKey]:
        """Keys of all complete chunks of a request, first to last."""
        return chunk_keys(request, self._hashes_per_chunk, adapter.digest)

    def records(self, chunks: Sequence[ChunkKey]) -> list[RecordKey]:
        """Keys of all records of these chunks, chunk by chunk."""
        groups = range(len(self._groups))
        return [record_key(chunk, group) for chunk in chunks for group in groups]

    def found(self, chunks: Sequence[ChunkKey], first: int) -> int:
        """End of the run of chunks in memory, with all their records, from number `first` on."""
        found = first
        while found < len(chunks) and self._is_ready(chunks[found]):
            found += 1
        return found

    def load_items(
        self, chunks: Sequence[ChunkKey], start: int, end: int, tables: Sequence[Sequence[int]]
    ) -> list[LoadItem]:
        """Orders to fill tokens start .. end - 1, both at block boundaries.

        tables: the request's block ids by cache group.
        """
        items = []
        for chunk in range(start // self._chunk_tokens, -(-end // self._chunk_tokens)):
            chunk_start = chunk * self._chunk_tokens
            chunk_end = chunk_start + self._chunk_tokens
            for number, (group, table) in enumerate(zip(self._groups, tables, strict=True)):
                size = group.block_size
                first, last = max(start, chunk_start) // size, min(end, chunk_end) // size
                items.append(
                    LoadItem(
                        key=record_key(chunks[chunk], number),
                        start=chunk_start,
                        first_block=first - chunk_start // size,
                        block_ids=list(table[first:last]),
                        group=number,
                    )
                )
        return items

    def _is_ready(self, chunk: ChunkKey) -> bool:
        groups = range(len(self._groups))
        return all(self._index.is_ready(record_key(chunk, group)) for group in groups)
