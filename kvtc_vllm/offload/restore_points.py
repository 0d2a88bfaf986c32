"""Which records of a chunk are worth storing, and in which blocks they lie.

A restore point is a boundary behind which the engine can go on with what is stored. Attention
over all tokens needs the records of every chunk before it; windows and local chunks only those
just before it; recurrent layers the states at it. Requests are resumed at the end of a prompt, at
the end of an answer, and where prefixes part: there the records of all groups are stored,
elsewhere those of full attention.

A record of states is stored with the chunk that ends at its boundary. The engine has states only
where a step ends, so a boundary that lies inside a step has none.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup, check_chunks
from kvtc_vllm.offload.requests import RequestState


class RestorePoints:
    """Used by the scheduler's thread only. Raises ConfigError if chunks are not whole blocks."""

    def __init__(self, config: KVTCConfig, geometry: CacheGeometry) -> None:
        check_chunks(config, geometry)
        self._length = config.chunk_tokens
        self._groups = geometry.groups
        # With the blocks per chunk.
        self._sized = [(group, self._length // group.block_size) for group in geometry.groups]
        self._all = list(range(len(geometry.groups)))
        self.keep_all = all(group.keeps_all for group in geometry.groups)
        """Whether every chunk has a record of every group."""
        # The same prompt again goes on at most so far before its end: at a whole chunk, or at
        # the recent window.
        self._back = max(1, config.window) + self._length

    def complete(self, tables: Sequence[Sequence[int]], hashed_chunks: int) -> int:
        """Chunks with a hash whose blocks are in all tables."""
        complete = hashed_chunks
        for group, size in self._sized:
            for table in group.tables:
                complete = min(complete, len(tables[table]) // size)
        return complete

    def wanted(self, state: RequestState, chunk: int, before: int, after: int) -> list[int]:
        """Numbers of the cache groups whose record of a chunk is to be stored.

        before, after: tokens computed before and after this step. Blocks that the engine gave back
        before it hold something else.
        """
        if self.keep_all:
            return self._all
        return [
            number
            for number, group in enumerate(self._groups)
            if group.keeps_all
            or (self._is_held(group, chunk, before, after) and self._is_near(group, chunk, state))
        ]

    def blocks(
        self, tables: Sequence[Sequence[int]], chunk: int, wanted: Sequence[int]
    ) -> tuple[list[int], ...]:
        """Blocks of a chunk by cache group; none for a record that is not wanted.

        tables: the request's block ids by block table of the engine.
        """
        found = []
        for number, (group, size) in enumerate(self._sized):
            end = (chunk + 1) * size
            first = end - 1 if group.state_bytes else end - size
            found.append(group.blocks(tables, first, end) if number in wanted else [])
        return tuple(found)

    def is_passing(self, group: int, start: int, state: RequestState) -> bool:
        """Whether a record is of an answer that goes on, and needed only until it has."""
        return not self._groups[group].keeps_all and start >= state.request.num_prompt_tokens

    def is_passed(self, group: int, start: int, complete: int) -> bool:
        """Whether no restore point near the end of `complete` chunks needs a record.

        start: of its chunk, in tokens. The last chunk may fail to be stored, so the one before
        counts as the end.
        """
        end = max(0, (complete - 1) * self._length - self._back)
        return start + self._length <= self._groups[group].reach.first_needed(end)

    def _is_held(self, group: CacheGroup, chunk: int, before: int, after: int) -> bool:
        """Whether the engine has all that a record holds, after this step."""
        if group.state_bytes:
            return after == (chunk + 1) * self._length
        first_block = group.reach.first_needed(before) // group.block_size
        return first_block * group.block_size <= chunk * self._length

    def _is_near(self, group: CacheGroup, chunk: int, state: RequestState) -> bool:
        """Whether a restore point of the request needs tokens of a chunk."""
        start, end = chunk * self._length, (chunk + 1) * self._length
        first = group.reach.first_needed
        if end > first(max(0, state.request.num_prompt_tokens - self._back)):
            return True
        return start < state.junction and end > first(state.junction)
