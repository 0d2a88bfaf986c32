"""Least recently used."""

from __future__ import annotations

from kvtc_vllm.tiers.key_order import KeyOrder
from kvtc_vllm.tiers.keys import RecordKey


class LRUPolicy:
    """Evicts the chunk that was used longest ago."""

    name = "lru"

    def __init__(self, capacity: int) -> None:
        del capacity  # LRU keeps no history, so it needs no bound for one
        self._order = KeyOrder()
        self._held: set[RecordKey] = set()

    def insert(self, key: RecordKey, size: int) -> None:
        if key not in self._held:
            self._order.push(key)

    def hit(self, key: RecordKey) -> None:
        if key in self._order:
            self._order.push(key)

    def refresh(self, key: RecordKey) -> None:
        self.hit(key)

    def hold(self, key: RecordKey) -> None:
        if self._order.discard(key):
            self._held.add(key)

    def release(self, key: RecordKey) -> None:
        if key in self._held:
            self._held.discard(key)
            self._order.push(key)

    def remove(self, key: RecordKey) -> None:
        self._held.discard(key)
        self._order.discard(key)

    def evict(self) -> RecordKey | None:
        return self._order.pop_oldest()

    def clear(self) -> None:
        self._order.clear()
        self._held.clear()
