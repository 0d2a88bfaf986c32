"""Stores at once while that costs nothing, and when the engine's cache evicts otherwise."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from kvtc_vllm.offload.on_evict import OnEvict
from kvtc_vllm.offload.store_policy import Around, Candidate, Storable
from kvtc_vllm.offload.tier_view import TierView
from kvtc_vllm.tiers.keys import ChunkKey, RecordKey

PATIENCE_SECONDS = 2.0
"""An encoder that has not done after so long what it was given does not keep up."""
REPORTED_AFTER = 3
"""Steps. What one step orders is encoded during the next at the earliest, whose report is there
when the third is planned, as vLLM plans a step ahead. Steps may take longer than `PATIENCE_SECONDS`
each, which says nothing of the encoder."""


class Auto(Around):
    """A `StorePolicy` around `OnEvict`.

    As long as memory has room and the encoder keeps up, a chunk is stored when it is complete, as
    an engine may crash. Under pressure only what the engine's own cache gives up is. But one step
    may give up all of it, so no more than `at_once` chunks are put off, if there is a limit.
    """

    def __init__(
        self,
        inner: OnEvict,
        tier: TierView,
        at_once: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(inner)
        self._on_evict = inner
        self._tier = tier
        self._at_once = at_once
        self._put_off: set[ChunkKey] = set()
        self._clock = clock
        self._ordered: deque[tuple[float, int, ChunkKey]] = deque()
        """(when, in which step, what)."""
        self._step = 0

    def completed(self, chunks: Sequence[Candidate]) -> Sequence[Candidate]:
        if not self._keeps_up():
            return self._put_off_all(chunks)
        if self._tier.has_room:
            return self._at_once_all(chunks)
        if self._at_once is None:
            return self._put_off_all(chunks)
        room = max(0, self._at_once - len(self._put_off))
        later, now = chunks[:room], chunks[room:]
        return [*self._put_off_all(later), *self._at_once_all(now)]

    def due(self) -> Sequence[Storable]:
        self._step += 1
        due = self._inner.due()
        self._put_off.difference_update(chunk.key for chunk in due if chunk.block_ids[0])
        return due

    def take_gone(self) -> Sequence[RecordKey]:
        gone = self._inner.take_gone()
        self._put_off.difference_update(gone)
        return gone

    def _put_off_all(self, chunks: Sequence[Candidate]) -> Sequence[Candidate]:
        at_once = self._inner.completed(chunks)
        self._put_off.update(chunk.key for chunk in chunks if not chunk.stored)
        # The first group's record stands for a chunk: it has the chunk's key.
        self._put_off.difference_update(chunk.key for chunk in at_once if chunk.block_ids[0])
        return at_once

    def _at_once_all(self, chunks: Sequence[Candidate]) -> Sequence[Candidate]:
        now = self._clock()
        for chunk in chunks:
            self._on_evict.follow(chunk)  # the tier may evict it before the engine does
            self._put_off.discard(chunk.key)
            if not chunk.stored:
                self._ordered.append((now, self._step, chunk.key))
        return chunks

    def clear(self) -> None:
        self._ordered.clear()
        self._put_off.clear()
        super().clear()

    def _keeps_up(self) -> bool:
        ordered = self._ordered
        while ordered and not self._tier.is_waiting(ordered[0][2]):
            ordered.popleft()
        if not ordered or self._step - ordered[0][1] < REPORTED_AFTER:
            return True
        return self._clock() - ordered[0][0] < PATIENCE_SECONDS
