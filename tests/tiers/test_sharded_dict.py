"""Dictionaries of very many keys: as one dictionary, but no call handles many entries at once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvtc_vllm.offload.seen_counter import SeenCounter
from kvtc_vllm.tiers import policies, sharded_dict
from kvtc_vllm.tiers.blob_store import StoreError
from kvtc_vllm.tiers.disk_index import REMOVED_AT_ONCE, DiskIndex
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.key_order import KeyOrder
from kvtc_vllm.tiers.keys import ChunkKey
from kvtc_vllm.tiers.memory import MemoryArena
from kvtc_vllm.tiers.once_store import OnceStore
from kvtc_vllm.tiers.sharded_dict import FREED_AT_ONCE, SHARDS, NumberDict, ShardedDict
from kvtc_vllm.tiers.token_windows import TOKEN_BYTES, TokenWindows

MANY = 20_000
LARGEST_SHARE = 64
"""A dictionary that handles more than one record in so many at once is too large."""


def key_of(number: int) -> bytes:
    """Spread like hashes."""
    return ((number * 0x9E3779B97F4A7C15) % 2**64).to_bytes(8, "big") + number.to_bytes(4, "big")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["set", "pop", "get", "delete", "default", "clear"]),
            st.binary(min_size=1, max_size=2),
            st.integers(0, 9),
        ),
        max_size=50,
    )
)
def test_it_is_a_dictionary(steps: list[tuple[str, bytes, int]]) -> None:
    made: ShardedDict[int] = ShardedDict()
    model: dict[bytes, int] = {}
    for operation, key, value in steps:
        if operation == "set":
            made[key] = model[key] = value
        elif operation == "pop":
            assert made.pop(key, None) == model.pop(key, None)
        elif operation == "get":
            assert made.get(key) == model.get(key)
        elif operation == "default":
            assert made.setdefault(key, value) == model.setdefault(key, value)
        elif operation == "delete" and key in model:
            del made[key], model[key]
        elif operation == "clear" and value == 0:
            made.clear()
            model.clear()
        assert (dict(made), len(made), key in made) == (model, len(model), key in model)
    with pytest.raises(KeyError):
        made[b"nowhere"]


@given(st.lists(st.tuples(st.sampled_from("spdc"), st.integers(-600, 600)), max_size=50))
def test_one_of_numbers_is_a_dictionary(steps: list[tuple[str, int]]) -> None:
    made: NumberDict[str] = NumberDict()
    model: dict[int, str] = {}
    for operation, key in steps:
        if operation == "s":
            made[key] = model[key] = operation
        elif operation == "p":
            assert made.pop(key, None) == model.pop(key, None)
        elif operation == "d" and key in model:
            del made[key], model[key]
        elif operation == "c" and key % 8 == 0:
            made.clear()
            model.clear()
        assert (dict(made), len(made), made.get(key)) == (model, len(model), model.get(key))


def dictionaries(thing: Any, seen: set[int]) -> list[dict[Any, Any]]:
    """All that hang on an object of ours, but for those of its attributes."""
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, dict):
        return [thing]
    if isinstance(thing, list):
        return [found for item in thing for found in dictionaries(item, seen)]
    inner = getattr(thing, "__dict__", {})
    return [found for item in inner.values() for found in dictionaries(item, seen)]


def _memory(policy: str) -> TierIndex:
    index = TierIndex(1 << 40, 1, policies.REGISTRY[policy](1 << 40))
    for number in range(MANY):
        index.reserve(key_of(number), 10)
        index.commit(key_of(number), 0, 10)
    return index


def _disk(policy: str) -> DiskIndex:
    index = DiskIndex(1 << 40, 1, policies.REGISTRY[policy](1 << 40))
    index.restore({0: [(key_of(number), 10) for number in range(MANY)]})
    return index


def _arena(policy: str) -> MemoryArena:
    arena = MemoryArena(1 << 40)
    for number in range(MANY):
        arena.write(key_of(number), b"blob")
    return arena


def _once(policy: str) -> OnceStore:
    store = OnceStore(MemoryArena(1 << 40), 4, 4)
    for number in range(MANY):
        store.write(key_of(number), b"head%d tail" % number, b"tenant")
    return store


def _windows(policy: str) -> TokenWindows:
    windows = TokenWindows()
    chance = random.Random(1)
    for number in range(MANY // 8):
        windows.add(key_of(number), b"tenant", chance.randbytes(TOKEN_BYTES * 128))
    return windows


def _seen(policy: str) -> SeenCounter:
    seen = SeenCounter(2)
    for number in range(MANY):
        seen.admits(ChunkKey(key_of(number)))
    return seen


@pytest.mark.parametrize("policy", sorted(policies.REGISTRY))
@pytest.mark.parametrize("make", [_memory, _disk, _arena, _once, _windows, _seen])
def test_no_dictionary_has_many_of_the_records(make: Callable[[str], Any], policy: str) -> None:
    """What is full moves all that it has, and keeps Python's lock meanwhile."""
    sizes = [len(found) for found in dictionaries(make(policy), set())]
    assert sum(sizes) >= MANY
    assert max(sizes) <= MANY / LARGEST_SHARE


@pytest.mark.parametrize("make", [_memory, _disk, _arena, _windows])
def test_what_is_cleared_goes_in_small_pieces(
    make: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    index = make("lru")
    held = [found for found in dictionaries(index, set()) if found]
    pieces = sum(map(len, held)) // FREED_AT_ONCE
    assert pieces > 20
    index.clear()
    assert len(index) == 0
    while any(held):  # their threads go on
        pass
    assert len(pauses) >= pieces


def test_few_are_freed_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_dict.threading, "Thread", None)
    made: ShardedDict[int] = ShardedDict()
    for number in range(FREED_AT_ONCE):
        made[key_of(number)] = number
    made.clear()
    assert len(made) == 0


def test_an_order_keeps_its_slots_in_many_dictionaries() -> None:
    order = KeyOrder()
    for number in range(2 * SHARDS):
        order.push(key_of(number))
    assert list(order) == [key_of(number) for number in range(2 * SHARDS)]
    assert max(map(len, order._keys)) == 3 - 1


def test_an_arena_that_was_cleared_holds_no_more_than_its_capacity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a thread has not freed yet still takes memory, and goes when it is needed."""
    monkeypatch.setattr(MemoryArena, "_free", lambda self: None)
    arena = MemoryArena(1000)
    for number in range(100):
        arena.write(key_of(number), bytes(10))
    arena.clear()
    assert (arena.used, len(arena), arena.keys()) == (0, 0, [])
    with pytest.raises(StoreError):
        arena.write(key_of(1), bytes(1001))
    for number in range(100):
        arena.write(key_of(number), bytes(10))
        assert arena.used + sum(len(b) for d in arena._cleared for b in d.values()) <= 1000
    assert arena.keys() == [key_of(number) for number in range(100)]
    assert arena._cleared == []


def test_a_start_with_a_smaller_capacity_is_told_in_pieces() -> None:
    index = DiskIndex(64, 1, policies.REGISTRY["lru"](64))
    keys = [key_of(number) for number in range(2 * REMOVED_AT_ONCE + 10)]
    index.restore({0: [(key, 63) for key in keys]})
    told = [index.take_removed() for _ in range(4)]
    assert [len(one) for one in told] == [REMOVED_AT_ONCE, REMOVED_AT_ONCE, 9, 0]
    assert [key for one in told for key in one] == keys[:-1]
