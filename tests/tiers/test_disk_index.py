"""The scheduler's index of the disk: ranks, order of eviction, losses."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvtc_vllm.tiers import policies
from kvtc_vllm.tiers.disk_index import DiskIndex


def make(capacity: int = 6400, ranks: int = 1, policy: str = "lru") -> DiskIndex:
    return DiskIndex(capacity, ranks, policies.REGISTRY[policy](capacity))


def test_a_chunk_is_ready_once_every_rank_has_it() -> None:
    index = make(ranks=2)
    index.add(b"a", 1, 100)
    assert not index.is_ready(b"a")
    index.add(b"a", 0, 300)
    assert index.is_ready(b"a")
    assert (index.used, index.part_bytes(b"a"), len(index)) == (400, 300, 1)
    index.add(b"a", 0, 300)  # written again
    assert index.used == 400
    assert index.part_bytes(b"unknown") == 0


@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_the_oldest_make_room_and_the_newest_stays(policy: str) -> None:
    index = make(policy=policy)
    for key in (b"a", b"b", b"c"):
        index.add(key, 0, 2100)
    index.hit([b"a"])
    index.add(b"d", 0, 2100)
    assert index.take_removed() == [b"b"]
    assert index.take_removed() == []
    assert (index.used, index.evictions) == (6300, 1)
    index.add(b"e", 0, 6300)  # everything else makes room
    assert index.is_ready(b"e")
    assert len(index) == 1


def test_a_part_that_cannot_be_held_costs_nothing_but_itself() -> None:
    """A file whose size lies, among others of the right size."""
    index = make()
    index.restore({0: [(b"a", 100), (b"lie", 2 << 30), (b"b", 100)]})
    index.add(b"c", 0, 6400)
    assert index.take_removed() == [b"lie", b"c"]
    assert all(index.is_ready(key) for key in (b"a", b"b"))
    index.add(b"a", 0, 6400)  # one that was right before
    assert (len(index), index.used, index.take_removed()) == (1, 100, [b"a"])


def test_some_room_is_left_to_the_store() -> None:
    """Else the store, which makes room before it writes, would choose every victim."""
    index = make()
    for i in range(64):
        index.add(bytes([i]), 0, 100)
    assert index.used <= 6400 - 100
    assert index.take_removed() == [b"\0"]


def test_parts_without_their_other_ranks_go_first() -> None:
    """A write may have failed on one rank only."""
    index = make(ranks=2)
    for key in (b"a", b"b"):
        for rank in range(2):
            index.add(key, rank, 1000)
    index.add(b"half", 0, 2000)
    assert index.take_removed() == []
    index.add(b"c", 0, 1000)
    assert index.take_removed() == [b"half"]
    index.add(b"c", 1, 1000)
    assert all(index.is_ready(key) for key in (b"a", b"b", b"c"))


def test_a_restart_keeps_order_and_removes_what_is_incomplete() -> None:
    index = make(ranks=2)
    index.restore(
        {
            0: [(b"old", 1000), (b"only0", 1000), (b"mid", 1000), (b"new", 1000)],
            1: [(b"only1", 1000), (b"old", 1000), (b"new", 1000), (b"mid", 1000)],
        }
    )
    assert index.take_removed() == [b"only0", b"only1"]
    assert (len(index), index.used) == (3, 6000)
    for rank in range(2):
        index.add(b"next", rank, 500)
    assert index.take_removed() == [b"old"]


def test_a_restart_under_a_smaller_cap_keeps_the_most_recent() -> None:
    index = make(capacity=640, ranks=2)
    entries = [(bytes([i]), 100) for i in range(10)]
    index.restore({0: entries, 1: entries})
    assert index.take_removed() == [bytes([i]) for i in range(7)]
    assert all(index.is_ready(bytes([i])) for i in range(7, 10))


def test_a_rank_without_inventory_leaves_nothing_usable() -> None:
    index = make(ranks=2)
    index.restore({0: [(b"a", 1)], 1: []})
    assert index.take_removed() == [b"a"]
    assert len(index) == 0
    make().restore({})


def test_a_lost_part_takes_the_others_along() -> None:
    index = make(ranks=2)
    for rank in range(2):
        index.add(b"a", rank, 100)
    index.lose(b"a")
    index.lose(b"a")
    assert index.take_removed() == [b"a"]
    assert (index.used, len(index), index.evictions) == (0, 0, 0)


def test_hits_are_told_head_last() -> None:
    index = make()
    for key in (b"a", b"b", b"c"):
        index.add(key, 0, 10)
    assert index.hit([b"a", b"b", b"missing", b"c"]) == [b"c", b"b", b"a"]


def test_clear_leaves_the_deletions_to_the_workers() -> None:
    index = make(ranks=2)
    index.add(b"a", 0, 10)
    index.lose(b"a")
    index.add(b"b", 0, 10)
    index.clear()
    assert (index.used, len(index), index.take_removed()) == (0, 0, [])


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1), st.integers(1, 2000), st.booleans()))
)
def test_bytes_are_those_of_the_parts(steps: list[tuple[int, int, int, bool]]) -> None:
    index = make(ranks=2)
    for number, rank, size, lost in steps:
        if lost:
            index.lose(bytes([number]))
        else:
            index.add(bytes([number]), rank, size)
        partial = sum(sum(parts.values()) for parts in index._partial.values())
        complete = sum(sum(index._packing.unpack(p)) for p in index._complete.values())
        assert index.used == partial + complete
        assert len(index) == len(index._partial) + len(index._complete)
        assert index.used <= index.capacity
