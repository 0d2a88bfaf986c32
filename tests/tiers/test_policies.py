"""Eviction policies: order, pins, and ARC against its defining properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtc_vllm.tiers import policies


def key(i: int) -> bytes:
    return i.to_bytes(4, "big")


@pytest.mark.parametrize("name", sorted(policies.REGISTRY))
def test_evicts_everything_once_and_only_what_it_holds(name: str) -> None:
    policy = policies.REGISTRY[name](1000)
    for i in range(5):
        policy.insert(key(i), 10)
    policy.remove(key(3))
    victims = [policy.evict() for _ in range(6)]
    assert sorted(v for v in victims if v) == [key(0), key(1), key(2), key(4)]
    assert victims[4:] == [None, None]


@pytest.mark.parametrize("name", sorted(policies.REGISTRY))
def test_pinned_chunks_are_passed_over(name: str) -> None:
    policy = policies.REGISTRY[name](1000)
    for i in range(3):
        policy.insert(key(i), 10)
    policy.hold(key(0))
    assert policy.evict() == key(1)
    policy.hold(key(2))
    policy.refresh(key(2))
    policy.hit(key(2))
    assert policy.evict() is None
    policy.release(key(0))
    policy.release(key(9))
    assert policy.evict() == key(0)
    policy.remove(key(2))
    policy.release(key(2))
    assert policy.evict() is None


@pytest.mark.parametrize("name", sorted(policies.REGISTRY))
def test_a_released_chunk_is_the_most_recent(name: str) -> None:
    policy = policies.REGISTRY[name](1000)
    for i in range(3):
        policy.insert(key(i), 10)
    policy.hold(key(0))
    policy.release(key(0))
    assert [policy.evict() for _ in range(3)] == [key(1), key(2), key(0)]


def test_held_chunks_count_for_arc_s_balance() -> None:
    """Else a load that pins much of one list would make it look small."""
    policy = policies.REGISTRY["arc"](100)
    for i in range(4):
        policy.insert(key(i), 10)
    for i in range(2):
        policy.hit(key(i))
    policy.hold(key(2))
    assert policy.evict() == key(3)  # what was seen once goes first
    policy.hit(key(2))
    policy.release(key(2))
    assert [policy.evict() for _ in range(3)] == [key(0), key(1), key(2)]


@pytest.mark.parametrize("name", sorted(policies.REGISTRY))
def test_unknown_keys_and_clear(name: str) -> None:
    policy = policies.REGISTRY[name](1000)
    policy.hit(key(9))
    policy.refresh(key(9))
    policy.remove(key(9))
    policy.insert(key(1), 10)
    policy.clear()
    assert policy.evict() is None


def test_lru_order_follows_hits_and_refreshes() -> None:
    policy = policies.REGISTRY["lru"](1000)
    for i in range(4):
        policy.insert(key(i), 10)
    policy.hit(key(0))
    policy.refresh(key(1))
    assert [policy.evict() for _ in range(4)] == [key(2), key(3), key(0), key(1)]


def test_arc_keeps_reused_chunks_through_a_scan() -> None:
    """The point of ARC: a scan of chunks used once does not flush those used twice."""
    capacity, size = 100, 10
    resident: dict[str, set[bytes]] = {}
    for name in ("lru", "arc"):
        policy = policies.REGISTRY[name](capacity)
        held: set[bytes] = set()

        def insert(k: bytes, policy=policy, held=held) -> None:
            while (len(held) + 1) * size > capacity:
                victim = policy.evict()
                assert victim is not None
                held.remove(victim)
            policy.insert(k, size)
            held.add(k)

        for i in range(5):
            insert(key(i))
            policy.hit(key(i))
        for i in range(100, 140):
            insert(key(i))
        resident[name] = held
    assert {key(i) for i in range(5)} <= resident["arc"]
    assert not {key(i) for i in range(5)} & resident["lru"]


def test_arc_refresh_does_not_count_as_a_use() -> None:
    policy = policies.REGISTRY["arc"](100)
    policy.insert(key(0), 10)
    policy.insert(key(1), 10)
    policy.hit(key(1))
    policy.refresh(key(0))
    assert policy.evict() == key(0)


def test_arc_grows_the_list_that_was_too_small() -> None:
    """A chunk that returns after eviction comes back as one seen again."""
    policy = policies.REGISTRY["arc"](20)
    policy.insert(key(0), 10)
    assert policy.evict() == key(0)
    policy.insert(key(0), 10)
    policy.insert(key(1), 10)
    # key(0) is in the frequent list now, and the target favours recent ones less.
    assert {policy.evict(), policy.evict()} == {key(0), key(1)}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["insert", "hit", "refresh", "evict", "remove", "hold", "release"]),
            st.integers(0, 12),
        ),
        max_size=200,
    ),
    st.sampled_from(sorted(policies.REGISTRY)),
)
def test_policy_agrees_with_a_set(operations: list[tuple[str, int]], name: str) -> None:
    policy = policies.REGISTRY[name](60)
    resident: set[bytes] = set()
    held: set[bytes] = set()
    for operation, i in operations:
        if operation == "insert":
            if key(i) not in resident:
                policy.insert(key(i), 7 + i)
                resident.add(key(i))
        elif operation == "evict":
            victim = policy.evict()
            assert (victim in resident - held) if resident - held else victim is None
            resident.discard(victim or b"")
        else:
            getattr(policy, operation)(key(i))
            if operation == "remove":
                resident.discard(key(i))
                held.discard(key(i))
            elif operation == "hold":
                held |= {key(i)} & resident
            elif operation == "release":
                held.discard(key(i))
    drained = set()
    while (victim := policy.evict()) is not None:
        drained.add(victim)
    assert drained == resident - held
