"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from kvtc_vllm.tiers.keys import RecordKey


class LRUPolicy:
    """Evicts the chunk that was used longest ago."""

    name = "lru"

    def __init__(self, capacity: int) -> None:
        del capacity  # LRU keeps no history, so it needs no bound for one
        self._order: OrderedDict[RecordKey, int] = OrderedDict()

    def insert(self, key: RecordKey, size: int) -> None:
        self._order[key] = size
        self._order.move_to_end(key)

    def hit(self, key: RecordKey) -> None:
        if key in self._order:
            self._order.move_to_end(key)

    def refresh(self, key: RecordKey) -> None:
        self.hit(key)

    def remove(self, key: RecordKey) -> None:
        self._order.pop(key, None)

    def evict(self, evictable: Callable[[RecordKey], bool]) -> RecordKey | None:
        victim = next((key for key in self._order if evictable(key)), None)
        if victim is not None:
            del self._order[victim]
        return victim

    def clear(self) -> None:
        self._order.clear()
