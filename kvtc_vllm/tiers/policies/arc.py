"""Adaptive replacement cache (Megiddo & Modha, FAST 2003), in bytes.

Four lists: T1 (seen once) and T2 (seen again) are resident, B1 and B2 remember
keys evicted from them. A return of a remembered key moves the target size p of
T1. The original counts pages; here every size, target and bound is in bytes,
since chunks differ in size.
"""

from __future__ import annotations

from kvtc_vllm.tiers.key_order import KeyOrder
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.sharded_dict import ShardedDict


class _SizedList:
    """Keys in order of recency, some held, with the sum of the sizes of all."""

    def __init__(self) -> None:
        self._sizes: ShardedDict[int] = ShardedDict()
        self._order = KeyOrder()
        self.bytes = 0

    def __contains__(self, key: RecordKey) -> bool:
        return key in self._sizes.shards[key[0]]

    def push(self, key: RecordKey, size: int) -> None:
        self._sizes.shards[key[0]][key] = size
        self._order.push(key)
        self.bytes += size

    def pop(self, key: RecordKey) -> int:
        size = self._sizes.shards[key[0]].pop(key)
        self._order.discard(key)
        self.bytes -= size
        return size

    def pop_oldest(self) -> tuple[RecordKey, int] | None:
        """The oldest that is not held, and its size."""
        key = self._order.pop_oldest()
        return None if key is None else (key, self.pop(key))

    def refresh(self, key: RecordKey) -> None:
        if key in self._order:
            self._order.push(key)

    def hold(self, key: RecordKey) -> None:
        self._order.discard(key)

    def release(self, key: RecordKey) -> None:
        self._order.push(key)

    def is_held(self, key: RecordKey) -> bool:
        return key in self._sizes and key not in self._order

    def clear(self) -> None:
        self._sizes.clear()
        self._order.clear()
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
                held = resident.is_held(key)
                self._seen_again.push(key, resident.pop(key))
                if held:
                    self._seen_again.hold(key)
                return

    def refresh(self, key: RecordKey) -> None:
        for resident in (self._seen_once, self._seen_again):
            if key in resident:
                resident.refresh(key)

    def hold(self, key: RecordKey) -> None:
        for resident in (self._seen_once, self._seen_again):
            if key in resident:
                resident.hold(key)

    def release(self, key: RecordKey) -> None:
        for resident in (self._seen_once, self._seen_again):
            if key in resident:
                resident.release(key)

    def remove(self, key: RecordKey) -> None:
        for resident in (self._seen_once, self._seen_again):
            if key in resident:
                resident.pop(key)

    def evict(self) -> RecordKey | None:
        lists = [(self._seen_once, self._ghost_once), (self._seen_again, self._ghost_again)]
        if self._seen_once.bytes <= self._target:
            lists.reverse()
        for resident, ghost in lists:
            victim = resident.pop_oldest()
            if victim is not None:
                ghost.push(*victim)
                self._trim_ghosts()
                return victim[0]
        return None

    def clear(self) -> None:
        for sized in (self._seen_once, self._seen_again, self._ghost_once, self._ghost_again):
            sized.clear()
        self._target = 0.0

    def _trim_ghosts(self) -> None:
        """Keep the bounds of the original: |T1|+|B1| <= c and all four <= 2c."""
        while (
            self._ghost_once.bytes
            and self._seen_once.bytes + self._ghost_once.bytes > self._capacity
        ):
            self._ghost_once.pop_oldest()
        resident = self._seen_once.bytes + self._seen_again.bytes
        while (
            self._ghost_again.bytes
            and resident + self._ghost_once.bytes + self._ghost_again.bytes > 2 * self._capacity
        ):
            self._ghost_again.pop_oldest()
