"""The scheduler's index of a tier: what is resident, how big it is, what goes next.

The scheduler is the only authority. A record is *pending* from the moment its
store is issued until every rank has reported the real size of its part, then
*ready*. Room for a store is reserved at an upper bound before it is issued, so
real bytes never exceed the budget; the reservation shrinks to the real size
when the rank reports. Evicted keys are handed down to the workers in the order
of the decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.policies import EvictionPolicy
from kvtc_vllm.tiers.rank_sizes import RankSizes
from kvtc_vllm.tiers.sharded_dict import ShardedDict


@dataclass
class _Pending:
    """A store under way. `sizes[rank]` is real once `reported[rank]`, else the reservation."""

    sizes: list[int]
    reported: list[bool]
    doomed: bool = False
    place: int | None = None


class TierIndex:
    """Index of one tier over all ranks. Single-threaded (the scheduler's thread).

    vLLM's words: `reserve` is `prepare_store`; `commit` and `abandon` are `complete_store`, well
    or not; `pin` and `unpin` are `prepare_load` and `complete_load`; `hit` and `refresh` are
    `touch`. capacity: bytes over all ranks; each rank gets an equal share.

    keepers: the first so many ranks keep parts, None for all. The others report like them, so that
    a record is ready when nothing on any rank speaks against it, and sizes of theirs don't count.
    """

    def __init__(
        self, capacity: int, ranks: int, policy: EvictionPolicy, keepers: int | None = None
    ) -> None:
        keepers = ranks if keepers is None else keepers
        self.capacity = capacity
        self.ranks = ranks
        self.keepers = keepers
        self.rank_capacity = capacity // keepers
        self._policy = policy
        self._packing = RankSizes(keepers)
        # Of what is ready there may be millions: nothing here is a container.
        self._ready: ShardedDict[bytes] = ShardedDict()
        self._pending: dict[RecordKey, _Pending] = {}
        self._pins: dict[RecordKey, int] = {}
        self._doomed: dict[RecordKey, bytes] = {}  # bad, but still pinned
        self._places: ShardedDict[int] = ShardedDict()
        self._used = [0] * keepers
        self._ready_bytes = 0
        self._ready_records = 0
        self._evicted: list[RecordKey] = []
        self._victims: list[RecordKey] = []
        self.evictions = 0
        self.evicted_bytes = 0

    def reserve(self, key: RecordKey, bound: int) -> bool:
        """Make room for a record of at most `bound` bytes per rank and mark it pending.

        Evicts as needed, but nothing for a bound above a rank's capacity. False if it's already
        known or no room can be made.
        """
        if self.is_known(key) or bound > self.rank_capacity:
            return False
        while max(self._used) + bound > self.rank_capacity:
            if not self._evict_one():
                return False
        self._pending[key] = _Pending([bound] * self.keepers, [False] * self.ranks)
        for rank in range(self.keepers):
            self._used[rank] += bound
        return True

    def put(self, key: RecordKey, place: int) -> None:
        """Take note of where the one part of a record lies. Before `commit`."""
        pending = self._pending.get(key)
        if pending is not None:
            pending.place = place

    def place_of(self, key: RecordKey) -> int | None:
        """Where the one part of a ready record lies; None if it is not ready, or nobody told."""
        return self._places.get(key) if self.is_ready(key) else None

    def commit(self, key: RecordKey, rank: int, size: int) -> None:
        """Take note that a rank stored its part; when all have, the record is ready."""
        self._report(key, rank, size, failed=False)

    def resize(self, key: RecordKey, rank: int, size: int) -> None:
        """Take note that a rank's part of a record takes other bytes than when it was stored."""
        pending = self._pending.get(key)
        if pending is not None:
            if pending.reported[rank]:
                self._used[rank] += size - pending.sizes[rank]
                pending.sizes[rank] = size
            return
        ready = self.is_ready(key)
        found = self._ready.shards[key[0]] if ready else self._doomed
        if key not in found:
            return
        sizes = list(self._packing.unpack(found[key]))
        change = size - sizes[rank]
        sizes[rank] = size
        found[key] = self._packing.pack(sizes)
        self._used[rank] += change
        if ready:
            self._ready_bytes += change

    def abandon(self, key: RecordKey, rank: int) -> None:
        """Take note that a rank could not store its part; when all have reported, it goes."""
        self._report(key, rank, 0, failed=True)

    def discard(self, key: RecordKey) -> None:
        """Drop a ready record that turned out to be bad; pinned ones go when unpinned."""
        packed = self._ready.pop(key, None)
        if packed is None:
            return
        self._policy.remove(key)
        self._ready_records -= 1
        sizes = self._packing.unpack(packed)
        self._ready_bytes -= sum(sizes)
        if key in self._pins:
            self._doomed[key] = packed
        else:
            self._forget(key, sizes)

    def is_ready(self, key: RecordKey) -> bool:
        """True if every rank holds the record."""
        return key in self._ready.shards[key[0]]

    def bytes_of(self, key: RecordKey) -> int:
        """Real bytes of a ready record over all ranks; 0 for any other."""
        packed = self._ready.get(key)
        return 0 if packed is None else sum(self._packing.unpack(packed))

    def is_known(self, key: RecordKey) -> bool:
        """True if the record is ready or pending, or bad and still pinned."""
        return self.is_ready(key) or key in self._pending or key in self._doomed

    def is_pending(self, key: RecordKey) -> bool:
        """True until every rank has reported its part."""
        return key in self._pending

    def pin(self, keys: Iterable[RecordKey]) -> list[RecordKey]:
        """Protect ready records from eviction; returns those that were, to be unpinned."""
        pinned = [key for key in keys if self.is_ready(key)]
        for key in pinned:
            pins = self._pins.get(key, 0)
            if not pins:
                self._policy.hold(key)
            self._pins[key] = pins + 1
        return pinned

    def unpin(self, keys: Sequence[RecordKey]) -> None:
        """Undo one `pin`. Of a prefix, given first record first, the tail is evicted first."""
        for key in reversed(keys):
            pins = self._pins.get(key, 0)
            if pins > 1:
                self._pins[key] = pins - 1
            elif pins:
                del self._pins[key]
                packed = self._doomed.pop(key, None)
                if packed is not None:
                    self._forget(key, self._packing.unpack(packed))
                else:
                    self._policy.release(key)

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
        self._ready.clear()
        self._pending.clear()
        self._pins.clear()
        self._doomed.clear()
        self._places.clear()
        self._policy.clear()
        self._evicted.clear()
        self._victims.clear()
        self._used = [0] * self.keepers
        self._ready_bytes = 0
        self._ready_records = 0

    @property
    def pending(self) -> int:
        """Stores that not every rank has reported."""
        return len(self._pending)

    @property
    def used(self) -> int:
        """Bytes of all ranks, reservations included."""
        return sum(self._used)

    @property
    def ready_bytes(self) -> int:
        """Real bytes of ready records over all ranks."""
        return self._ready_bytes

    def __len__(self) -> int:
        return self._ready_records + len(self._pending) + len(self._doomed)

    def _report(self, key: RecordKey, rank: int, size: int, failed: bool) -> None:
        entry = self._pending.get(key)
        if entry is None or entry.reported[rank]:
            return
        if rank < self.keepers:
            self._used[rank] += size - entry.sizes[rank]
            entry.sizes[rank] = size
        entry.reported[rank] = True
        entry.doomed |= failed
        if not all(entry.reported):
            return
        del self._pending[key]
        if entry.doomed:
            self._forget(key, entry.sizes)
        else:
            total = sum(entry.sizes)
            self._ready.shards[key[0]][key] = self._packing.pack(entry.sizes)
            self._ready_records += 1
            if entry.place is not None:
                self._places[key] = entry.place
            self._ready_bytes += total
            self._policy.insert(key, total)

    def _evict_one(self) -> bool:
        victim = self._policy.evict()
        if victim is None:
            return False
        sizes = self._packing.unpack(self._ready.shards[victim[0]].pop(victim))
        self._ready_records -= 1
        self._ready_bytes -= sum(sizes)
        self.evictions += 1
        self.evicted_bytes += sum(sizes)
        self._victims.append(victim)
        self._forget(victim, sizes)
        return True

    def _forget(self, key: RecordKey, sizes: Sequence[int]) -> None:
        for rank, size in enumerate(sizes):
            self._used[rank] -= size
        self._places.pop(key, None)
        self._evicted.append(key)
