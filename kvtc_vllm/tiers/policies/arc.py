"""Adaptive replacement cache (Megiddo & Modha, FAST 2003), in bytes.

Four lists: T1 (seen once) and T2 (seen again) are resident, B1 and B2 remember
keys evicted from them. A return of a remembered key moves the target size p of
T1. The original counts pages; here every size, target and bound is in bytes,
since chunks differ in size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from kvtc_vllm.tiers.keys import RecordKey


class _SizedList:
    """Keys in order of recency with the sum of their sizes."""

    def __init__(self) -> None:
        self.items: OrderedDict[RecordKey, int] = OrderedDict()
        self.bytes = 0

    def __contains__(self, key: RecordKey) -> bool:
        return key in self.items

    def push(self, key: RecordKey, size: int) -> None:
        self.items[key] = size
        self.bytes += size

    def pop(self, key: RecordKey) -> int:
        size = self.items.pop(key)
        self.bytes -= size
        return size

    def pop_oldest(self) -> None:
        _, size = self.items.popitem(last=False)
        self.bytes -= size

    def clear(self) -> None:
        self.items.clear()
        self.bytes = 0


class ARCPolicy:
    """Evicts by recency and frequency, shifted to whichever it wrongly evicted by before."""

    name = "arc"

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._target = 0.0
        self._seen_once = _SizedList()
        self._seen_again = _SizedList()
        self._ghost_once = _SizedList()
        self._ghost_again = _SizedList()

    def insert(self, key: RecordKey, size: int) -> None:
        self.remove(key)
        if key in self._ghost_once:
            ratio = self._ghost_again.bytes / max(1, self._ghost_once.bytes)
            self._target = min(self._capacity, self._target + max(1.0, ratio) * size)
            self._ghost_once.pop(key)
            self._seen_again.push(key, size)
        elif key in self._ghost_again:
            ratio = self._ghost_once.bytes / max(1, self._ghost_again.bytes)
            self._target = max(0.0, self._target - max(1.0, ratio) * size)
            self._ghost_again.pop(key)
            self._seen_again.push(key, size)
        else:
            self._seen_once.push(key, size)

    def hit(self, key: RecordKey) -> None:
        for resident in (self._seen_once, self._seen_again):
            if key in resident:
                self._seen_again.push(key, resident.pop(key))
                return

    def refresh(self, key: RecordKey) -> None:
        for resident in (self._seen_once, self._seen_again):
            if key in resident:
                resident.push(key, resident.pop(key))
                return

    def remove(self, key: RecordKey) -> None:
        for resident in (self._seen_once, self._seen_again):
            if key in resident:
                resident.pop(key)

    def evict(self, evictable: Callable[[RecordKey], bool]) -> RecordKey | None:
        first, second = self._seen_once, self._seen_again
        if first.bytes <= self._target:
            first, second = second, first
        for resident in (first, second):
            victim = next((key for key in resident.items if evictable(key)), None)
            if victim is not None:
                size = resident.pop(victim)
                ghost = self._ghost_once if resident is self._seen_once else self._ghost_again
                ghost.push(victim, size)
                self._trim_ghosts()
                return victim
        return None

    def clear(self) -> None:
        for sized in (self._seen_once, self._seen_again, self._ghost_once, self._ghost_again):
            sized.clear()
        self._target = 0.0

    def _trim_ghosts(self) -> None:
        """Keep the bounds of the original: |T1|+|B1| <= c and all four <= 2c."""
        while (
            self._ghost_once.items
            and self._seen_once.bytes + self._ghost_once.bytes > self._capacity
        ):
            self._ghost_once.pop_oldest()
        resident = self._seen_once.bytes + self._seen_again.bytes
        while (
            self._ghost_again.items
            and resident + self._ghost_once.bytes + self._ghost_again.bytes > 2 * self._capacity
        ):
            self._ghost_again.pop_oldest()
