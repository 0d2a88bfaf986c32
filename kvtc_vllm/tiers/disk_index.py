"""The scheduler's index of the disk tier.

Unlike the memory tier's, it learns of records after the fact: from what workers found
when they started, and from what they have written since. The store below holds the
byte cap by itself (other processes may share it); this index chooses what goes first,
by the same policies as in memory, as long as this process is alone. It keeps some way
below the cap for that, because the store makes room before a record is written and this
index hears of it afterwards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.policies import EvictionPolicy

HEADROOM = 64
"""One part in so many of the capacity is left to writes that are under way."""


class DiskIndex:
    """Which records are on disk, over all ranks. Single-threaded (the scheduler's thread).

    capacity: bytes over all ranks, in whole disk blocks as the store counts them.
    """

    def __init__(self, capacity: int, ranks: int, policy: EvictionPolicy) -> None:
        self.capacity = capacity
        self.ranks = ranks
        self._limit = capacity - capacity // HEADROOM
        self._policy = policy
        self._sizes: dict[RecordKey, dict[int, int]] = {}
        self._partial: OrderedDict[RecordKey, None] = OrderedDict()
        self._removed: list[RecordKey] = []
        self.used = 0
        self.evictions = 0

    def restore(self, inventories: Mapping[int, Sequence[tuple[RecordKey, int]]]) -> None:
        """Take over what each rank found at start, (key, bytes), least recently used first.

        Records that not every rank holds are of no use and are removed.
        """
        parts: dict[RecordKey, dict[int, int]] = {}
        for rank, entries in inventories.items():
            for key, size in entries:
                parts.setdefault(key, {})[rank] = size
        self._removed += [key for key, sizes in parts.items() if len(sizes) < self.ranks]
        for key, _ in next(iter(inventories.values()), ()):
            if len(parts[key]) == self.ranks:
                for rank, size in parts[key].items():
                    self.add(key, rank, size)

    def add(self, key: RecordKey, rank: int, size: int) -> None:
        """Take note that a rank has its part on disk, `size` bytes of it."""
        parts = self._sizes.setdefault(key, {})
        self.used += size - parts.get(rank, 0)
        parts[rank] = size
        if len(parts) < self.ranks:
            self._partial[key] = None
        else:
            self._partial.pop(key, None)
            self._policy.insert(key, sum(parts.values()))
        while self.used > self._limit and self._evict_one(key):
            self.evictions += 1

    def lose(self, key: RecordKey) -> None:
        """Drop a record of which a rank's part is gone or bad; the other ranks' parts go too."""
        if key in self._sizes:
            self._policy.remove(key)
            self._forget(key)

    def is_ready(self, key: RecordKey) -> bool:
        """True if every rank has its part."""
        return len(self._sizes.get(key, ())) == self.ranks

    def part_bytes(self, key: RecordKey) -> int:
        """The largest rank's part in bytes; 0 if unknown."""
        return max(self._sizes.get(key, {0: 0}).values())

    def hit(self, prefix: Iterable[RecordKey]) -> list[RecordKey]:
        """Count a use of a prefix, first record first; returns those on disk, oldest use first."""
        touched = [key for key in reversed(list(prefix)) if self.is_ready(key)]
        for key in touched:
            self._policy.hit(key)
        return touched

    def take_removed(self) -> list[RecordKey]:
        """Keys that workers must delete, since the last call."""
        removed, self._removed = self._removed, []
        return removed

    def clear(self) -> None:
        """Forget everything; files are left where they are."""
        self._sizes.clear()
        self._partial.clear()
        self._policy.clear()
        self._removed.clear()
        self.used = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def _evict_one(self, newest: RecordKey) -> bool:
        """Parts that wait for other ranks go first: their write may have failed there."""
        victim = next((key for key in self._partial if key != newest), None)
        if victim is None:
            victim = self._policy.evict(lambda key: key != newest)
        if victim is None:
            return False
        self._forget(victim)
        return True

    def _forget(self, key: RecordKey) -> None:
        self._partial.pop(key, None)
        self.used -= sum(self._sizes.pop(key).values())
        self._removed.append(key)
