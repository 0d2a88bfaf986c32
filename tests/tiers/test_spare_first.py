"""Records that are also elsewhere go first, whatever the policy around which this is."""

from __future__ import annotations

import pytest

from kvtc_vllm.tiers import policies
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.policies.spare_first import SpareFirst

KEYS = [bytes([n]) for n in range(5)]


def filled(name: str) -> tuple[TierIndex, SpareFirst]:
    """An index that is full of five records, of which the last is the most recent."""
    order = SpareFirst(policies.REGISTRY[name](500))
    index = TierIndex(500, 1, order)
    for key in KEYS:
        assert index.reserve(key, 100)  # type: ignore[arg-type]
        index.commit(key, 0, 100)  # type: ignore[arg-type]
    return index, order


def evicted(index: TierIndex, count: int) -> list[bytes]:
    """What goes for so many new records."""
    for number in range(count):
        assert index.reserve(b"new" + bytes([number]), 100)  # type: ignore[arg-type]
    return [bytes(key) for key in index.take_evicted()]


@pytest.mark.parametrize("name", sorted(policies.REGISTRY))
def test_spare_records_go_first_the_tail_before_the_head(name: str) -> None:
    index, order = filled(name)
    order.spare([KEYS[3], KEYS[4]])  # type: ignore[list-item]
    assert evicted(index, 3) == [KEYS[4], KEYS[3], KEYS[0]]


@pytest.mark.parametrize("name", sorted(policies.REGISTRY))
def test_the_end_of_a_request_leaves_them_spare_and_a_hit_does_not(name: str) -> None:
    index, order = filled(name)
    order.spare([KEYS[3], KEYS[4]])  # type: ignore[list-item]
    index.refresh([KEYS[3]])  # type: ignore[list-item]
    index.hit([KEYS[4]])  # type: ignore[list-item]
    assert evicted(index, 2) == [KEYS[3], KEYS[0]]


@pytest.mark.parametrize("name", sorted(policies.REGISTRY))
def test_kept_records_are_the_most_recent(name: str) -> None:
    index, order = filled(name)
    order.spare([KEYS[0], KEYS[1]])  # type: ignore[list-item]
    order.keep([KEYS[1], KEYS[0]])  # type: ignore[list-item]
    assert evicted(index, 4) == [KEYS[2], KEYS[3], KEYS[4], KEYS[1]]


@pytest.mark.parametrize("name", sorted(policies.REGISTRY))
def test_pinned_and_lost_records_are_left_alone(name: str) -> None:
    index, order = filled(name)
    order.spare(KEYS[:3])  # type: ignore[arg-type]
    index.pin([KEYS[2]])  # type: ignore[list-item]
    index.discard(KEYS[1])  # type: ignore[arg-type]
    index.take_evicted()
    assert evicted(index, 3) == [KEYS[0], KEYS[3]]  # one took the lost record's place
    index.clear()
    assert evicted(index, 5) == []
