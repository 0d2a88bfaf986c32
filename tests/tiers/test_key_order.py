"""Keys in order of use, against an ordered dictionary; and what the collector sees of them."""

from __future__ import annotations

import gc
from collections import OrderedDict

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvtc_vllm.tiers import policies
from kvtc_vllm.tiers.disk_index import DiskIndex
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.key_order import KeyOrder


@given(
    st.lists(
        st.tuples(st.sampled_from(["push", "discard", "pop", "clear"]), st.integers(0, 9)),
        max_size=200,
    )
)
def test_it_is_an_ordered_dictionary(steps: list[tuple[str, int]]) -> None:
    order = KeyOrder()
    model: OrderedDict[bytes, None] = OrderedDict()
    for operation, number in steps:
        key = bytes([number])
        if operation == "push":
            order.push(key)
            model[key] = None
            model.move_to_end(key)
        elif operation == "discard":
            assert order.discard(key) == (key in model)
            model.pop(key, None)
        elif operation == "pop":
            assert order.pop_oldest() == (model.popitem(last=False)[0] if model else None)
        elif number == 0:
            order.clear()
            model.clear()
        assert (list(order), len(order)) == (list(model), len(model))
        assert all((bytes([n]) in order) == (bytes([n]) in model) for n in range(10))


def reachable(root: object) -> int:
    """Objects that a full collection visits from here: containers and all that they refer to."""
    seen = {id(root)}
    waiting, visits = [root], 0
    while waiting:
        item = waiting.pop()
        if not gc.is_tracked(item):
            continue
        for found in gc.get_referents(item):
            visits += 1
            if id(found) not in seen and not isinstance(found, type):
                seen.add(id(found))
                waiting.append(found)
    return visits


def filled(kind: str, policy: str, records: int, ranks: int) -> object:
    capacity = 1 << 40
    made = policies.REGISTRY[policy](capacity)
    index: TierIndex | DiskIndex
    if kind == "memory":
        index = TierIndex(capacity, ranks, made)
    else:
        index = DiskIndex(capacity, ranks, made)
    for number in range(records):
        key = number.to_bytes(32, "big")
        if isinstance(index, TierIndex):
            index.reserve(key, 100)
        for rank in range(ranks):
            if isinstance(index, TierIndex):
                index.commit(key, rank, 1000 + number)
            else:
                index.add(key, rank, 1000 + number)
    index.hit([number.to_bytes(32, "big") for number in range(0, records, 3)])
    return index


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("policy", sorted(policies.REGISTRY))
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_the_collector_s_work_does_not_grow_with_the_records(
    kind: str, policy: str, ranks: int
) -> None:
    few, many = (filled(kind, policy, records, ranks) for records in (10, 3000))
    gc.collect()
    assert reachable(many) <= reachable(few) + 10
