"""Keys from the one used longest ago to the one used last, millions of them.

Python's cycle collector visits every container that it knows of: lists, tuples, `OrderedDict`
with each of its keys. A dictionary of nothing but bytes and numbers is not one of them (until
Python 3.14), and an `array` never is. So the order is a doubly linked list of slot numbers in
two arrays. No operation grows or frees a large dictionary in one go, see `sharded_dict`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.sharded_dict import SHARDS, ShardedDict, let_go

_END = 0
"""The slot that is no key's: before the oldest and after the newest."""


class KeyOrder:
    """An ordered set of keys. Every operation takes constant time; not thread-safe."""

    def __init__(self) -> None:
        self._slots: ShardedDict[int] = ShardedDict()
        self._begin()

    def push(self, key: RecordKey) -> None:
        """Make a key the newest, whether it is in or not."""
        slots = self._slots.shards[key[0]]
        slot = slots.get(key)
        if slot is None:
            slot = self._free.pop() if self._free else self._grow()
            slots[key] = slot
            self._keys[slot % SHARDS][slot] = key
        else:
            self._unlink(slot)
        newest = self._before[_END]
        self._before[slot], self._after[slot] = newest, _END
        self._after[newest] = self._before[_END] = slot

    def discard(self, key: RecordKey) -> bool:
        """Take a key out; False if it was not in."""
        slot = self._slots.shards[key[0]].pop(key, None)
        if slot is None:
            return False
        del self._keys[slot % SHARDS][slot]
        self._unlink(slot)
        self._free.append(slot)
        return True

    def pop_oldest(self) -> RecordKey | None:
        """Take the oldest key out; None if there is none."""
        slot = self._after[_END]
        if slot == _END:
            return None
        key = self._keys[slot % SHARDS][slot]
        self.discard(key)
        return key

    def clear(self) -> None:
        """Take all out."""
        self._slots.clear()
        let_go(self._keys)
        self._begin()

    def _begin(self) -> None:
        self._keys: list[dict[int, RecordKey]] = [{} for _ in range(SHARDS)]
        self._before = array("I", [_END])
        self._after = array("I", [_END])
        self._free = array("I")

    def __contains__(self, key: RecordKey) -> bool:
        return key in self._slots.shards[key[0]]

    def __len__(self) -> int:
        return len(self._after) - 1 - len(self._free)

    def __iter__(self) -> Iterator[RecordKey]:
        """Oldest first; nothing may change meanwhile."""
        slot = self._after[_END]
        while slot != _END:
            yield self._keys[slot % SHARDS][slot]
            slot = self._after[slot]

    def _grow(self) -> int:
        self._before.append(_END)
        self._after.append(_END)
        return len(self._after) - 1

    def _unlink(self, slot: int) -> None:
        before, after = self._before[slot], self._after[slot]
        self._after[before] = after
        self._before[after] = before
