"""Stores at once while that costs nothing, and when the engine's cache evicts otherwise."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from kvtc_vllm.offload.on_evict import OnEvict
from kvtc_vllm.offload.store_policy import Candidate, Storable
from kvtc_vllm.offload.tier_view import TierView
from kvtc_vllm.offload.vllm_types import BlockPool
from kvtc_vllm.tiers.keys import ChunkKey

PATIENCE_SECONDS = 2.0
"""An encoder that has not done after so long what it was given does not keep up."""


class Auto:
    """A `StorePolicy` around `OnEvict`.

    As long as memory has room and the encoder keeps up, a chunk is stored when it is complete, as
    an engine may crash. Under pressure only what the engine's own cache gives up is.
    """

    watches = True

    def __init__(
        self, inner: OnEvict, tier: TierView, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._inner = inner
        self._tier = tier
        self._clock = clock
        self._ordered: deque[tuple[float, ChunkKey]] = deque()

    def bind(self, pool: BlockPool) -> None:
        self._inner.bind(pool)

    def completed(self, chunks: Sequence[Candidate]) -> Sequence[Candidate]:
        if not self._tier.has_room or not self._keeps_up():
            return self._inner.completed(chunks)
        now = self._clock()
        for chunk in chunks:
            self._inner.follow(chunk)  # the tier may evict it before the engine does
            if not chunk.stored:
                self._ordered.append((now, chunk.key))
        return chunks

    def due(self) -> Sequence[Storable]:
        return self._inner.due()

    def loaded(self, request_id: str, chunks: Iterable[ChunkKey]) -> None:
        self._inner.loaded(request_id, chunks)

    def take_kept(self) -> Sequence[Storable]:
        return self._inner.take_kept()

    def take_gone(self) -> Sequence[ChunkKey]:
        return self._inner.take_gone()

    def forget(self, request_id: str) -> None:
        self._inner.forget(request_id)

    def clear(self) -> None:
        self._ordered.clear()
        self._inner.clear()

    def _keeps_up(self) -> bool:
        ordered = self._ordered
        while ordered and not self._tier.is_waiting(ordered[0][1]):
            ordered.popleft()
        return not ordered or self._clock() - ordered[0][0] < PATIENCE_SECONDS
