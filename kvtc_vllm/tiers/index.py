"""The scheduler's index of a tier: what is resident, how big it is, what goes next.

The scheduler is the only authority. A record is *pending* from the moment its
store is issued until every rank has reported the real size of its part, then
*ready*. Room for a store is reserved at an upper bound before it is issued, so
real bytes never exceed the budget; the reservation shrinks to the real size
when the rank reports. Evicted keys are handed down to the workers in the order
of the decisions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.policies import EvictionPolicy


@dataclass
class _Entry:
    """One record. `sizes[rank]` is real once `reported[rank]`, else the reservation."""

    sizes: list[int]
    reported: list[bool]
    pins: int = 0
    doomed: bool = False
    counted: int = 0
    """What this record adds to the index's `ready_bytes`."""

    @property
    def complete(self) -> bool:
        return all(self.reported)


class TierIndex:
    """Index of one tier over all ranks. Single-threaded (the scheduler's thread).

    vLLM's words: `reserve` is `prepare_store`; `commit` and `abandon` are `complete_store`, well
    or not; `pin` and `unpin` are `prepare_load` and `complete_load`; `hit` and `refresh` are
    `touch`. capacity: bytes over all ranks; each rank gets an equal share.
    """

    def __init__(self, capacity: int, ranks: int, policy: EvictionPolicy) -> None:
        self.capacity = capacity
        self.ranks = ranks
        self.rank_capacity = capacity // ranks
        self._policy = policy
        self._entries: dict[RecordKey, _Entry] = {}
        self._used = [0] * ranks
        self._pending = 0
        self._ready_bytes = 0
        self._evicted: list[RecordKey] = []
        self._victims: list[RecordKey] = []
        self.evictions = 0
        self.evicted_bytes = 0

    def reserve(self, key: RecordKey, bound: int) -> bool:
        """Make room for a record of at most `bound` bytes per rank and mark it pending.

        Evicts as needed. False if it's already known or no room can be made.
        """
        if key in self._entries:
            return False
        while max(self._used) + bound > self.rank_capacity:
            if not self._evict_one():
                return False
        self._entries[key] = _Entry([bound] * self.ranks, [False] * self.ranks)
        for rank in range(self.ranks):
            self._used[rank] += bound
        self._pending += 1
        return True

    def commit(self, key: RecordKey, rank: int, size: int) -> None:
        """Take note that a rank stored its part; when all have, the record is ready."""
        entry = self._entries.get(key)
        if entry is None or entry.reported[rank]:
            return
        self._used[rank] += size - entry.sizes[rank]
        entry.sizes[rank] = size
        self._report(key, entry, rank)

    def resize(self, key: RecordKey, rank: int, size: int) -> None:
        """Take note that a rank's part of a record takes other bytes than when it was stored."""
        entry = self._entries.get(key)
        if entry is None or not entry.reported[rank]:
            return
        change = size - entry.sizes[rank]
        entry.sizes[rank] = size
        self._used[rank] += change
        if entry.counted:
            entry.counted += change
            self._ready_bytes += change

    def abandon(self, key: RecordKey, rank: int) -> None:
        """Take note that a rank could not store its part; when all have reported, it goes."""
        entry = self._entries.get(key)
        if entry is None or entry.reported[rank]:
            return
        self._used[rank] -= entry.sizes[rank]
        entry.sizes[rank] = 0
        entry.doomed = True
        self._report(key, entry, rank)

    def discard(self, key: RecordKey) -> None:
        """Drop a ready record that turned out to be bad; pinned ones go when unpinned."""
        entry = self._entries.get(key)
        if entry is None or not entry.complete:
            return
        entry.doomed = True
        self._policy.remove(key)
        self._collect(key, entry)

    def is_ready(self, key: RecordKey) -> bool:
        """True if every rank holds the record."""
        entry = self._entries.get(key)
        return entry is not None and entry.complete and not entry.doomed

    def is_known(self, key: RecordKey) -> bool:
        """True if the record is ready or pending."""
        return key in self._entries

    def is_pending(self, key: RecordKey) -> bool:
        """True until every rank has reported its part."""
        entry = self._entries.get(key)
        return entry is not None and not entry.complete

    def pin(self, keys: Iterable[RecordKey]) -> list[RecordKey]:
        """Protect ready records from eviction; returns those that were, to be unpinned."""
        pinned = [key for key in keys if self.is_ready(key)]
        for key in pinned:
            self._entries[key].pins += 1
        return pinned

    def unpin(self, keys: Iterable[RecordKey]) -> None:
        """Undo one `pin`."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and entry.pins:
                entry.pins -= 1
                self._collect(key, entry)

    def hit(self, prefix: Iterable[RecordKey]) -> None:
        """Count a use of a prefix, given first record first.

        Its first record ends up the most recent: a tail without its head is useless,
        so tails are to be evicted first.
        """
        for key in reversed(list(prefix)):
            self._policy.hit(key)

    def refresh(self, prefix: Iterable[RecordKey]) -> None:
        """Like `hit` without counting a use."""
        for key in reversed(list(prefix)):
            self._policy.refresh(key)

    def take_evicted(self) -> list[RecordKey]:
        """Keys that the workers must forget, since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def take_victims(self) -> list[RecordKey]:
        """Those of the evicted keys whose records were sound and only made room."""
        victims, self._victims = self._victims, []
        return victims

    def clear(self) -> None:
        """Forget everything, pending stores included (late reports are ignored)."""
        self._entries.clear()
        self._policy.clear()
        self._evicted.clear()
        self._victims.clear()
        self._used = [0] * self.ranks
        self._pending = 0
        self._ready_bytes = 0

    @property
    def pending(self) -> int:
        """Stores that not every rank has reported."""
        return self._pending

    @property
    def used(self) -> int:
        """Bytes of all ranks, reservations included."""
        return sum(self._used)

    @property
    def ready_bytes(self) -> int:
        """Real bytes of ready records over all ranks."""
        return self._ready_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def _report(self, key: RecordKey, entry: _Entry, rank: int) -> None:
        entry.reported[rank] = True
        if not entry.complete:
            return
        self._pending -= 1
        if entry.doomed:
            self._collect(key, entry)
        else:
            entry.counted = sum(entry.sizes)
            self._ready_bytes += entry.counted
            self._policy.insert(key, entry.counted)

    def _collect(self, key: RecordKey, entry: _Entry) -> None:
        """Remove a doomed record that nobody reads any more."""
        if entry.doomed and entry.pins == 0:
            self._remove(key, entry)

    def _evict_one(self) -> bool:
        victim = self._policy.evict(lambda key: self._entries[key].pins == 0)
        if victim is None:
            return False
        entry = self._entries[victim]
        self.evictions += 1
        self.evicted_bytes += sum(entry.sizes)
        self._victims.append(victim)
        self._remove(victim, entry)
        return True

    def _remove(self, key: RecordKey, entry: _Entry) -> None:
        for rank, size in enumerate(entry.sizes):
            self._used[rank] -= size
        self._ready_bytes -= entry.counted
        del self._entries[key]
        self._evicted.append(key)
