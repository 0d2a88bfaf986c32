"""The scheduler's index and the worker's arena: bytes, pins, states."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtc_vllm.tiers import policies
from kvtc_vllm.tiers.blob_store import StoreError
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.memory import MemoryArena


def make_index(capacity: int = 100, ranks: int = 1, policy: str = "lru") -> TierIndex:
    return TierIndex(capacity, ranks, policies.REGISTRY[policy](capacity))


def put(index: TierIndex, key: bytes, size: int, bound: int = 40) -> None:
    assert index.reserve(key, bound)
    for rank in range(index.ranks):
        index.commit(key, rank, size)


def test_pending_until_every_rank_reported() -> None:
    index = make_index(ranks=2)
    assert index.reserve(b"a", 40)
    assert index.used == 80
    index.commit(b"a", 0, 10)
    assert not index.is_ready(b"a")
    assert index.pending == 1
    index.commit(b"a", 1, 20)
    assert index.is_ready(b"a")
    assert (index.pending, index.used, index.ready_bytes) == (0, 30, 30)


def test_reserving_evicts_the_oldest_and_tells_the_workers() -> None:
    index = make_index()
    for key in (b"a", b"b", b"c"):
        put(index, key, 30)
    assert index.reserve(b"d", 40)
    assert index.take_evicted() == [b"a"]
    assert index.take_evicted() == []
    assert not index.is_known(b"a")
    assert (index.evictions, index.evicted_bytes) == (1, 30)


def test_pinned_chunks_stay_and_a_full_tier_refuses() -> None:
    index = make_index()
    put(index, b"a", 40)
    put(index, b"b", 40)
    index.pin([b"a", b"b"])
    assert not index.reserve(b"c", 40)
    index.unpin([b"a"])
    assert index.reserve(b"c", 40)
    assert index.take_evicted() == [b"a"]


def test_only_ready_chunks_can_be_pinned() -> None:
    index = make_index()
    put(index, b"a", 30)
    assert index.reserve(b"b", 40)
    assert index.pin([b"a", b"b", b"gone"]) == [b"a"]


def test_a_rank_that_fails_dooms_the_chunk_on_all() -> None:
    index = make_index(ranks=2)
    assert index.reserve(b"a", 40)
    index.abandon(b"a", 0)
    index.commit(b"a", 1, 10)
    assert not index.is_known(b"a")
    assert index.used == 0
    assert index.take_evicted() == [b"a"]


def test_discarded_while_pinned_goes_when_unpinned() -> None:
    index = make_index()
    put(index, b"a", 30)
    index.pin([b"a"])
    index.discard(b"a")
    assert not index.is_ready(b"a")
    assert index.used == 30
    index.unpin([b"a"])
    assert index.used == 0
    assert index.take_evicted() == [b"a"]


def test_late_reports_after_clear_are_ignored() -> None:
    index = make_index()
    assert index.reserve(b"a", 40)
    index.clear()
    index.commit(b"a", 0, 30)
    index.unpin([b"a"])
    assert (len(index), index.used, index.pending) == (0, 0, 0)


def test_a_prefix_loses_its_tail_first() -> None:
    index = make_index()
    for key in (b"a", b"b", b"c"):
        put(index, key, 30)
    index.hit([b"a", b"b", b"c"])
    assert index.reserve(b"d", 40)
    assert index.take_evicted() == [b"c"]


def test_arena_never_exceeds_its_cap() -> None:
    arena = MemoryArena(100)
    assert arena.write(b"a", bytes(60))
    with pytest.raises(StoreError, match="full"):
        arena.write(b"b", bytes(41))
    assert arena.write(b"a", bytes(100))
    assert (arena.used, len(arena), arena.keys()) == (100, 1, [b"a"])
    assert arena.remove([b"a", b"nothing"]) == 1
    assert arena.used == 0
    with pytest.raises(StoreError, match="missing"):
        arena.read(b"a")


class IndexMachine(RuleBasedStateMachine):
    """Random operations, checked against a plain model of what is resident."""

    keys = st.integers(0, 15).map(lambda i: bytes([i]))

    @initialize(ranks=st.integers(1, 3), policy=st.sampled_from(sorted(policies.REGISTRY)))
    def start(self, ranks: int, policy: str) -> None:
        self.capacity = 300 * ranks
        self.index = make_index(self.capacity, ranks, policy)
        self.pending: dict[bytes, set[int]] = {}
        self.ready: dict[bytes, int] = {}
        self.sizes: dict[bytes, int] = {}
        self.pinned: list[bytes] = []
        self.doomed: set[bytes] = set()

    def forget_evicted(self) -> None:
        for key in self.index.take_evicted():
            assert key not in self.pinned
            self.ready.pop(key, None)
            self.doomed.discard(key)

    @rule(key=keys, bound=st.integers(50, 120))
    def reserve(self, key: bytes, bound: int) -> None:
        known = key in self.pending or key in self.ready or key in self.doomed
        if self.index.reserve(key, bound):
            self.forget_evicted()
            assert not known
            self.pending[key] = set(range(self.index.ranks))
            self.sizes[key] = 0
        else:
            self.forget_evicted()

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), size=st.integers(1, 50), fails=st.booleans())
    def report(self, data: st.DataObject, size: int, fails: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.pending)))
        rank = data.draw(st.sampled_from(sorted(self.pending[key])))
        if fails:
            self.index.abandon(key, rank)
            self.doomed.add(key)
        else:
            self.index.commit(key, rank, size)
            self.sizes[key] += size
        self.pending[key].remove(rank)
        if not self.pending[key]:
            del self.pending[key]
            if key not in self.doomed:
                self.ready[key] = self.sizes[key]
            self.forget_evicted()

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.ready)))
        self.index.pin([key])
        self.pinned.append(key)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        key = self.pinned.pop()
        self.index.unpin([key])
        self.forget_evicted()

    @rule(key=keys)
    def touch(self, key: bytes) -> None:
        self.index.hit([key])
        self.index.refresh([key])

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "index"):
            return
        assert self.index.used <= self.capacity
        assert self.index.ready_bytes == sum(self.ready.values())
        assert self.index.pending == len(self.pending)
        held = len(self.index._ready) + len(self.index._pending) + len(self.index._doomed)
        assert len(self.index) == held
        for key in self.ready:
            assert self.index.is_ready(key)


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestIndexMachine = IndexMachine.TestCase
