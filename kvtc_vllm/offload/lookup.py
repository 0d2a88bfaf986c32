"""What a hit is: which records a prefix consists of, and which blocks they fill."""

from __future__ import annotations

from collections.abc import Sequence

from kvtc_vllm.offload.geometry import CacheGeometry
from kvtc_vllm.offload.keys import chunk_keys
from kvtc_vllm.offload.messages import AdapterUse, LoadItem
from kvtc_vllm.offload.vllm_types import Request
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.keys import ChunkKey, RecordKey, record_keys


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

    def records(self, chunks: Sequence[ChunkKey]) -> Sequence[RecordKey]:
        """Keys of all records of these chunks, chunk by chunk."""
        return record_keys(chunks, len(self._groups))

    def found(self, records: Sequence[RecordKey], first: int) -> int:
        """End of the run of chunks in memory, with all their records, from number `first` on.

        records: of all chunks of the request.
        """
        found, is_ready = first * len(self._groups), self._index.is_ready
        while found < len(records) and is_ready(records[found]):
            found += 1
        return found // len(self._groups)

    def load_items(
        self, records: Sequence[RecordKey], start: int, end: int, tables: Sequence[Sequence[int]]
    ) -> list[LoadItem]:
        """Orders to fill tokens start .. end - 1, both at block boundaries.

        records: of all chunks of the request. tables: the request's block ids by cache group.
        """
        items = []
        length, sizes = self._chunk_tokens, [group.block_size for group in self._groups]
        for chunk in range(start // length, -(-end // length)):
            chunk_start = chunk * length
            begin, stop = max(start, chunk_start), min(end, chunk_start + length)
            for group, size in enumerate(sizes):
                key = records[chunk * len(sizes) + group]
                inside = (begin - chunk_start) // size
                blocks = list(tables[group][begin // size : stop // size])
                items.append(LoadItem(key, chunk_start, inside, blocks, group))
        return items
