"""Cold records are halved before any is evicted, and all come to have equal shares."""

from __future__ import annotations

import pytest

from kvtc_vllm.tiers import policies
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.policies.halving import HalvingOrder

KEYS = [RecordKey(bytes([n])) for n in range(12)]


def filled(name: str = "lru", count: int = 6) -> tuple[TierIndex, HalvingOrder]:
    """An index of records of 100 bytes, of which the last is the most recent."""
    order = HalvingOrder(policies.REGISTRY[name](1200))
    index = TierIndex(1200, 1, order)
    for key in KEYS[:count]:
        assert index.reserve(key, 100)
        index.commit(key, 0, 100)
    return index, order


def halve(order: HalvingOrder, times: int, last: bool = False) -> RecordKey | None:
    key = order.take_coldest()
    if key is not None:
        order.halved(key, times, last)
    return key


@pytest.mark.parametrize("name", sorted(policies.REGISTRY))
def test_the_coldest_first_and_uses_count(name: str) -> None:
    index, order = filled(name, 4)
    index.hit([KEYS[0]])
    index.refresh([KEYS[1]])
    assert [halve(order, 1) for _ in range(2)] == [KEYS[2], KEYS[3]]
    # Two whole ones are left, and two of half the size.
    assert halve(order, 1) == KEYS[0]


def test_bytes_come_to_be_equal_and_then_records_are_evicted() -> None:
    index, order = filled(count=12)
    named: list[RecordKey] = []
    while (key := order.take_coldest()) is not None:
        times = sum(key == other for other in named) + 1
        named.append(key)
        order.halved(key, times, times == 2)
    once, twice = (sum(named.count(key) == n for key in KEYS) for n in (1, 2))
    whole = 12 - once - twice
    # Bytes of 100, 50 and 25: none has more than those that can't be halved again.
    assert twice / 4 >= max(whole, once / 2)
    assert whole >= 1
    assert once >= 2
    # The coldest were halved most, and the hottest not at all.
    often = [named.count(key) for key in KEYS]
    assert often == sorted(often, reverse=True)
    assert index.reserve(KEYS[0], 100) is False  # known: nothing was evicted so far
    assert order.evict() == KEYS[0]


def test_a_record_is_named_once_at_a_time() -> None:
    _, order = filled(count=2)
    assert [order.take_coldest(), order.take_coldest()] == KEYS[:2]
    assert order.take_coldest() is None
    order.halved(KEYS[0], 1, last=False)
    assert order.take_coldest() == KEYS[0]


def test_pinned_records_are_not_named_and_stay_as_they_are() -> None:
    index, order = filled(count=3)
    assert halve(order, 1) == KEYS[0]
    index.pin([KEYS[0], KEYS[1]])
    assert [order.take_coldest(), order.take_coldest()] == [KEYS[2], None]
    index.unpin([KEYS[0], KEYS[1]])
    # Whole ones first: they have the most bytes.
    assert [order.take_coldest(), order.take_coldest()] == [KEYS[1], KEYS[0]]


def test_one_that_is_pinned_while_it_is_halved() -> None:
    index, order = filled(count=2)
    key = order.take_coldest()
    assert key == KEYS[0]
    index.pin([key])
    order.halved(key, 1, last=False)
    assert order.take_coldest() == KEYS[1]
    assert order.take_coldest() is None
    index.unpin([key])
    assert order.take_coldest() == key
    # And the other way round: released before it is known what became of it.
    index.pin([key])
    index.unpin([key])
    assert order.take_coldest() is None
    order.halved(key, 2, last=False)
    assert order.take_coldest() == key


@pytest.mark.parametrize("way", ["discard", "evict", "clear"])
def test_what_is_gone_is_not_named(way: str) -> None:
    index, order = filled(count=1)
    assert order.take_coldest() == KEYS[0]
    if way == "discard":
        index.discard(KEYS[0])
    elif way == "clear":
        index.clear()
    else:
        assert order.evict() == KEYS[0]
    order.halved(KEYS[0], 1, last=False)
    assert order.take_coldest() is None
    # Stored again, it is whole.
    order.insert(KEYS[0], 100)
    assert order.take_coldest() == KEYS[0]
