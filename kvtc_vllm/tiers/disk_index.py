"""The scheduler's index of the disk tier.

Unlike the memory tier's, it learns of records after the fact: from what workers found
when they started, and from what they have written since. The store below holds the
byte cap by itself (other processes may share it); this index chooses what goes first,
by the same policies as in memory, as long as this process is alone. It keeps some way
below the cap for that, because the store makes room before a record is written and this
index hears of it afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.policies import EvictionPolicy
from kvtc_vllm.tiers.rank_sizes import RankSizes
from kvtc_vllm.tiers.sharded_dict import ShardedDict

HEADROOM = 64
"""One part in so many of the capacity is left to writes that are under way."""

REMOVED_AT_ONCE = 4096
"""Keys a step: after a start with a smaller capacity there may be a million."""


class DiskIndex:
    """Which records are on disk, over all ranks. Single-threaded (the scheduler's thread).

    capacity: bytes over all ranks, in whole disk blocks as the store counts them.
    """

    def __init__(self, capacity: int, ranks: int, policy: EvictionPolicy) -> None:
        self.capacity = capacity
        self.ranks = ranks
        self._limit = capacity - capacity // HEADROOM
        self._policy = policy
        self._packing = RankSizes(ranks)
        # Of what is complete there may be millions: nothing here is a container.
        self._complete: ShardedDict[bytes] = ShardedDict()
        self._complete_records = 0
        self._partial: dict[RecordKey, dict[int, int]] = {}
        self._removed: list[RecordKey] = []
        self.used = 0
        self.evictions = 0

    def restore(self, inventories: Mapping[int, Iterable[tuple[RecordKey, int]]]) -> None:
        """Take over what each rank found at start, (key, bytes), least recently used first.

        Records that not every rank holds are of no use and are removed.
        """
        others: ShardedDict[dict[int, int]] = ShardedDict()
        first, *more = inventories or (0,)
        for rank in more:
            for key, size in inventories[rank]:
                others.setdefault(key, {})[rank] = size
        for key, size in inventories.get(first, ()):
            parts = {first: size, **others.pop(key, {})}
            if len(parts) < self.ranks:
                self._removed.append(key)
                continue
            for rank, part in parts.items():
                self.add(key, rank, part)
        self._removed += map(RecordKey, others)

    def add(self, key: RecordKey, rank: int, size: int) -> None:
        """Take note that a rank has its part on disk, `size` bytes of it.

        A part that could never be held together with others is not taken in, but removed.
        """
        if size * self.ranks > self._limit:
            self._drop(key)
            self._removed.append(key)
            return
        shard = self._complete.shards[key[0]]
        packed = shard.pop(key, None)
        if packed is None:
            parts = self._partial.get(key, {})
        else:
            self._complete_records -= 1
            parts = self._unpack(packed)
        self.used += size - parts.get(rank, 0)
        parts[rank] = size
        if len(parts) < self.ranks:
            self._partial[key] = parts
        else:
            self._partial.pop(key, None)
            sizes = [parts[number] for number in range(self.ranks)]
            shard[key] = self._packing.pack(sizes)
            self._complete_records += 1
            self._policy.insert(key, sum(sizes))
        if self.used > self._limit:
            self._make_room(key)

    def resize(self, key: RecordKey, rank: int, size: int) -> None:
        """Take note that a rank's part takes other bytes, and is as old as it was."""
        packed = self._complete.get(key)
        if packed is None:
            return
        sizes = list(self._packing.unpack(packed))
        self.used += size - sizes[rank]
        sizes[rank] = size
        self._complete[key] = self._packing.pack(sizes)

    @property
    def ready_bytes(self) -> int:
        """As `used`: nothing is reserved."""
        return self.used

    def bytes_of(self, key: RecordKey) -> int:
        """Of all parts together; 0 if not every rank has one."""
        packed = self._complete.get(key)
        return 0 if packed is None else sum(self._packing.unpack(packed))

    def lose(self, key: RecordKey) -> None:
        """Drop a record of which a rank's part is gone or bad; the other ranks' parts go too."""
        if self._drop(key):
            self._removed.append(key)

    def is_ready(self, key: RecordKey) -> bool:
        """True if every rank has its part."""
        return key in self._complete.shards[key[0]]

    def part_bytes(self, key: RecordKey) -> int:
        """The largest rank's part in bytes; 0 if not every rank has one."""
        packed = self._complete.get(key)
        return 0 if packed is None else max(self._packing.unpack(packed))

    def hit(self, prefix: Iterable[RecordKey]) -> list[RecordKey]:
        """Count a use of a prefix, first record first; returns those on disk, oldest use first."""
        touched = [key for key in reversed(list(prefix)) if self.is_ready(key)]
        for key in touched:
            self._policy.hit(key)
        return touched

    def take_removed(self) -> list[RecordKey]:
        """Keys that workers must delete, those first that were told first.

        At most `REMOVED_AT_ONCE`, the others with the next calls.
        """
        removed = self._removed[:REMOVED_AT_ONCE]
        del self._removed[:REMOVED_AT_ONCE]
        return removed

    def clear(self) -> None:
        """Forget everything; files are left where they are."""
        self._complete.clear()
        self._partial.clear()
        self._policy.clear()
        self._removed.clear()
        self._complete_records = 0
        self.used = 0

    def __len__(self) -> int:
        return self._complete_records + len(self._partial)

    def _make_room(self, newest: RecordKey) -> None:
        """Parts that wait for other ranks go first: their write may have failed there."""
        self._policy.hold(newest)
        while self.used > self._limit:
            victim = next((key for key in self._partial if key != newest), None)
            if victim is None:
                victim = self._policy.evict()
            if victim is None:
                break
            self.lose(victim)
            self.evictions += 1
        self._policy.release(newest)

    def _drop(self, key: RecordKey) -> bool:
        """Take a record out; False if it was not in."""
        parts = self._partial.pop(key, None)
        if parts is None:
            packed = self._complete.pop(key, None)
            if packed is None:
                return False
            self._complete_records -= 1
            parts = self._unpack(packed)
            self._policy.remove(key)
        self.used -= sum(parts.values())
        return True

    def _unpack(self, packed: bytes) -> dict[int, int]:
        return dict(enumerate(self._packing.unpack(packed)))
