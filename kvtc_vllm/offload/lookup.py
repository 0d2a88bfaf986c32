"""What a hit is: which records a prefix consists of, and which blocks they fill.

A prefix can be restored at a boundary if every cache group can go on there: attention over all
tokens needs the records of all chunks before it, a window those of the chunks that it reaches, a
recurrent layer the states at the boundary. Which boundaries have them is decided when chunks are
stored, in `restore_points`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup
from kvtc_vllm.offload.keys import chunk_keys
from kvtc_vllm.offload.messages import AdapterUse, LoadItem
from kvtc_vllm.offload.vllm_types import Request
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.keys import ChunkKey, RecordKey, record_keys

NULL_BLOCK = 0
"""vLLM's placeholder for a block that a request does not need."""

Has = Callable[[RecordKey], bool]
"""Whether a tier has a record."""


class Found(NamedTuple):
    """Of one request, in tokens from its first."""

    end: int
    """Where it can go on, within the limit."""
    available: int
    """Where it could go on without a limit."""
    run: int
    """End of the records of full attention."""


class PrefixLookup:
    """Chunks of a request and their records. Used by the scheduler's thread only."""

    def __init__(self, config: KVTCConfig, geometry: CacheGeometry, index: TierIndex) -> None:
        self._chunk_tokens = config.chunk_tokens
        self._window = max(1, config.window)
        self._has_states = geometry.has_states
        # States are kept at the ends of chunks.
        self._boundary = self._chunk_tokens if self._has_states else geometry.boundary_tokens
        self._index = index
        self._groups = geometry.groups
        self._hashes_per_chunk = self._chunk_tokens // geometry.hash_tokens
        self._of_all = sum(group.keeps_all for group in geometry.groups)
        self._windows = list(enumerate(geometry.groups))[self._of_all :]

    def chunks(self, request: Request, adapter: AdapterUse) -> list[ChunkKey]:
        """Keys of all complete chunks of a request, first to last."""
        return chunk_keys(request, self._hashes_per_chunk, adapter.digest)

    def records(self, chunks: Sequence[ChunkKey]) -> Sequence[RecordKey]:
        """Keys of all records of these chunks, chunk by chunk."""
        return record_keys(chunks, len(self._groups))

    def found(
        self, records: Sequence[RecordKey], start: int, num_tokens: int, has: Has | None = None
    ) -> Found:
        """How far a request of `num_tokens` tokens can be restored, of which vLLM has `start`.

        Not into its recent window. But where states were kept in there and none shortly before it,
        that would be no hit at all; then at most to its last token but one. records: of all chunks
        of the request. has: instead of "in memory".
        """
        found = self._found(records, start, self._limit(num_tokens, self._window), has)
        if self._has_states and found.available - found.end > self._window + self._chunk_tokens:
            # One token must be left to compute, for its logits.
            found = self._found(records, start, self._limit(num_tokens, 1), has)
        return found

    def _limit(self, num_tokens: int, left: int) -> int:
        """Last boundary behind which so many tokens are left to compute."""
        limit = max(0, num_tokens - left)
        return limit - limit % self._boundary

    def _found(
        self, records: Sequence[RecordKey], start: int, limit: int, has: Has | None
    ) -> Found:
        """limit: at a boundary."""
        has = has or self._index.is_ready
        run = self._run(records, start, has) * self._chunk_tokens
        if not self._windows:
            return Found(min(run, limit), run, run)
        available = self._restorable(records, start, run, has)
        end = available
        if available > limit:
            end = self._restorable(records, start, min(run, limit), has)
        return Found(end, available, run)

    def needed(self, records: Sequence[RecordKey], start: int, end: int) -> Sequence[RecordKey]:
        """Keys of the records that restore tokens start .. end - 1, chunk by chunk.

        records: of all chunks of the request.
        """
        if end <= start:
            return []
        length, groups = self._chunk_tokens, len(self._groups)
        first, stop = start // length, -(-end // length)
        if not self._windows:
            return records[first * groups : stop * groups]
        begins = [self._begin(group, start, end) // length for group in self._groups]
        return [
            records[chunk * groups + number]
            for chunk in range(first, stop)
            for number, begin in enumerate(begins)
            if chunk >= begin
        ]

    def wanted(
        self, records: Sequence[RecordKey], start: int, num_tokens: int, has: Has
    ) -> Sequence[RecordKey]:
        """Keys of the records to be had in memory for the longest load, chunk by chunk.

        num_tokens: see `found`. has: whether a record is in any tier.
        """
        if not self._windows:  # a prefix of them is of use as well, so none needs to be tried
            return self.needed(records, start, self._limit(num_tokens, self._window))
        return self.needed(records, start, self.found(records, start, num_tokens, has).end)

    def load_items(
        self, records: Sequence[RecordKey], start: int, end: int, tables: Sequence[Sequence[int]]
    ) -> list[LoadItem]:
        """Orders to fill tokens start .. end - 1, both at boundaries.

        records: of all chunks of the request. tables: the request's block ids by block table.
        """
        items = []
        length, groups = self._chunk_tokens, self._groups
        begins = [self._begin(group, start, end) for group in groups]
        for chunk in range(start // length, -(-end // length)):
            chunk_start = chunk * length
            stop = min(end, chunk_start + length)
            for number, group in enumerate(groups):
                begin, size = max(begins[number], chunk_start), group.block_size
                if begin >= stop:
                    continue
                key = records[chunk * len(groups) + number]
                inside = (begin - chunk_start) // size
                blocks = group.blocks(tables, begin // size, stop // size)
                items.append(LoadItem(key, chunk_start, inside, blocks, number))
        return items

    def fits(self, start: int, end: int, tables: Sequence[Sequence[int]]) -> bool:
        """Whether vLLM has allocated exactly the blocks that `load_items` fills.

        It does not clear them, so a block that is left out would hold somebody else's KV.
        """
        for _, group in self._windows:
            size, begin = group.block_size, self._begin(group, start, end)
            if any(group.blocks(tables, start // size, begin // size)):
                return False
            if NULL_BLOCK in group.blocks(tables, begin // size, end // size):
                return False
        return True

    def _run(self, records: Sequence[RecordKey], start: int, has: Has) -> int:
        """Chunks from the first on of which vLLM or the tier has all tokens' records."""
        groups, of_all = len(self._groups), self._of_all
        chunk = start // self._chunk_tokens
        if groups == of_all:
            found = chunk * groups
            for key in records[found:]:
                if not has(key):
                    break
                found += 1
            return found // groups
        while chunk * groups < len(records):
            if not all(has(key) for key in records[chunk * groups : chunk * groups + of_all]):
                break
            chunk += 1
        return chunk

    def _restorable(self, records: Sequence[RecordKey], start: int, end: int, has: Has) -> int:
        """Last boundary up to `end` at which all windows can go on; `start` if there is none."""
        while end > start:
            gap = self._first_gap(records, start, end, has)
            if gap is None:
                return end
            # As long as the chunk that lacks is before the boundary, it is needed.
            end = gap * self._chunk_tokens
        return start

    def _first_gap(
        self, records: Sequence[RecordKey], start: int, end: int, has: Has
    ) -> int | None:
        """First chunk of which a window's record lacks to go on at `end`."""
        length, groups = self._chunk_tokens, len(self._groups)
        first: int | None = None
        for number, group in self._windows:
            chunks = range(self._begin(group, start, end) // length, -(-end // length))
            gap = next((c for c in chunks if not has(records[c * groups + number])), None)
            if gap is not None:
                first = gap if first is None else min(first, gap)
        return first

    def _begin(self, group: CacheGroup, start: int, end: int) -> int:
        """First token that a load up to `end` fills, behind `start` tokens that vLLM has."""
        needed = group.reach.first_needed(end)
        return max(start, needed - needed % group.block_size)
