"""Stores at once while that costs nothing, and when the engine's cache evicts otherwise."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from kvtc_vllm.offload.on_evict import OnEvict
from kvtc_vllm.offload.store_policy import Around, Candidate
from kvtc_vllm.offload.tier_view import TierView
from kvtc_vllm.tiers.keys import ChunkKey

PATIENCE_SECONDS = 2.0
"""An encoder that has not done after so long what it was given does not keep up."""


class Auto(Around):
    """A `StorePolicy` around `OnEvict`.

    As long as memory has room and the encoder keeps up, a chunk is stored when it is complete, as
    an engine may crash. Under pressure only what the engine's own cache gives up is.
    """

    def __init__(
        self, inner: OnEvict, tier: TierView, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(inner)
        self._on_evict = inner
        self._tier = tier
        self._clock = clock
        self._ordered: deque[tuple[float, ChunkKey]] = deque()

    def completed(self, chunks: Sequence[Candidate]) -> Sequence[Candidate]:
        if not self._tier.has_room or not self._keeps_up():
            return self._inner.completed(chunks)
        now = self._clock()
        for chunk in chunks:
            self._on_evict.follow(chunk)  # the tier may evict it before the engine does
            if not chunk.stored:
                self._ordered.append((now, chunk.key))
        return chunks

    def clear(self) -> None:
        self._ordered.clear()
        super().clear()

    def _keeps_up(self) -> bool:
        ordered = self._ordered
        while ordered and not self._tier.is_waiting(ordered[0][1]):
            ordered.popleft()
        return not ordered or self._clock() - ordered[0][0] < PATIENCE_SECONDS
