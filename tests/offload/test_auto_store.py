"""Auto stores at once while that costs nothing; exclusive keeps what only the tier has."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.store_policy.engine import BLOCK, SimEngine
from kvtc_vllm.config import load_config
from kvtc_vllm.offload.auto_store import PATIENCE_SECONDS, REPORTED_AFTER, Auto
from kvtc_vllm.offload.geometry import CacheGeometry
from kvtc_vllm.offload.messages import NO_ADAPTER, AdapterUse, WorkerReport
from kvtc_vllm.offload.on_evict import BlockReuse, OnEvict
from kvtc_vllm.offload.store_policy import Candidate, Eager
from kvtc_vllm.offload.store_timing import chosen_policy, make_timing
from kvtc_vllm.offload.tier_view import TierView
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.policies.lru import LRUPolicy
from tests.connector.fakes import FakeRequest
from tests.offload.engines import CHUNK, GROUP, counters, engine, request, scheduler_side
from tests.offload.test_on_evict import PER_CHUNK, fill, keys


def test_at_once_while_there_is_room_and_late_when_there_is_not() -> None:
    side = scheduler_side(chunks=16, store_policy="auto", store_horizon=0)
    running = engine(256, side)
    first = [key for name in "abcd" for key in keys(fill(running, name, 4))]
    # Seven eighths of 16 are 14: after 15 there is none.
    assert set(running.memory) <= set(first)
    stored = running.totals.encoded_records
    assert 12 <= stored <= 16
    fill(running, "e", 4)
    assert running.totals.encoded_records == stored


def test_what_was_stored_at_once_and_evicted_by_the_tier_is_stored_again() -> None:
    side = scheduler_side(chunks=64, store_policy="auto", store_horizon=0)
    running = engine(32, side)
    first = fill(running, "a", 4)
    assert set(keys(first)) <= set(running.memory)
    for key in keys(first):
        side.index.discard(key)
    fill(running, "b", 8)
    assert set(keys(first)) <= set(running.memory)
    assert running.wrong == []


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_encoder_that_does_not_keep_up_is_left_alone() -> None:
    index, clock = TierIndex(1 << 20, 1, LRUPolicy(1 << 20)), Clock()
    tier = TierView(index, None, 1)
    inner = OnEvict(tier, BlockReuse(0), 0, lambda *counted: None)
    running = engine(64)
    inner.bind(running.pool)  # type: ignore[arg-type]
    policy = Auto(inner, tier, 8, clock)
    blocks = running.pool.get_new_blocks(4 * PER_CHUNK)
    for number, block in enumerate(blocks):
        running.pool.cache(block, bytes([number]))

    def completes(number: int) -> bool:
        """Whether this chunk is stored at once."""
        own = blocks[number * PER_CHUNK : (number + 1) * PER_CHUNK]
        chunk = candidate(number, [block.block_id for block in own])
        chosen = policy.completed([chunk])
        for found in chosen:
            assert index.reserve(found.key, 100)  # type: ignore[arg-type]
        return bool(chosen)

    def step(seconds: float) -> None:
        clock.now += seconds
        policy.due()

    policy.due()
    assert completes(0)
    step(PATIENCE_SECONDS / 2)
    assert completes(1)
    for _ in range(1, REPORTED_AFTER):
        step(0)
    assert completes(2)
    step(PATIENCE_SECONDS / 2)
    assert not completes(3)
    assert [bytes(kept.key) for kept in policy.take_kept()] == [b"chunk 3"]
    index.commit(b"chunk 0", 0, 50)  # type: ignore[arg-type]
    assert completes(3)


def test_slow_steps_say_nothing_of_the_encoder() -> None:
    """What it has done is told in a report, which comes with the end of a step."""
    index, clock = TierIndex(1 << 20, 1, LRUPolicy(1 << 20)), Clock()
    inner = OnEvict(TierView(index, None, 1), BlockReuse(0), 0, lambda *counted: None)
    running = engine(64)
    inner.bind(running.pool)  # type: ignore[arg-type]
    policy = Auto(inner, TierView(index, None, 1), 8, clock)
    blocks = [block.block_id for block in running.pool.get_new_blocks(PER_CHUNK)]
    for number in range(8):
        policy.due()
        if number >= REPORTED_AFTER:
            index.commit(f"chunk {number - REPORTED_AFTER}".encode(), 0, 50)  # type: ignore[arg-type]
        (chosen,) = policy.completed([candidate(number, blocks)])
        assert index.reserve(chosen.key, 100)  # type: ignore[arg-type]
        clock.now += 5 * PATIENCE_SECONDS


def candidate(number: int, blocks: list[int], adapter: AdapterUse = NO_ADAPTER) -> Candidate:
    first = number * CHUNK
    key = f"chunk {number}".encode()
    return Candidate(key, FakeRequest("r", 10 * CHUNK), first, first + CHUNK, (blocks,), adapter)  # type: ignore[arg-type]


def test_chunks_of_adapters_and_blocks_without_hashes_are_stored_at_once() -> None:
    index = TierIndex(1 << 20, 1, LRUPolicy(1 << 20))
    running = engine(64)
    policy = OnEvict(TierView(index, None, 1), BlockReuse(0), None, lambda *counted: None)
    unbound = candidate(0, [1, 2, 3, 4])
    assert policy.completed([unbound]) == [unbound]
    policy.bind(running.pool)  # type: ignore[arg-type]
    for number, block in enumerate(running.pool.get_new_blocks(4)):
        running.pool.cache(block, bytes([number]))
    assert policy.completed([candidate(0, [1, 2, 3, 4])]) == []
    adapted = candidate(1, [1, 2, 3, 4], AdapterUse(7, (b"digest",)))
    assert policy.completed([adapted]) == [adapted]
    hashless = candidate(2, [5, 6, 7, 8])
    assert policy.completed([hashless]) == [hashless]


def rounds(running: SimEngine, names: str, times: int) -> int:
    """Ask for the same prefixes again and again; tokens that were loaded."""
    before = running.totals.loaded_tokens
    for number in range(times):
        for name in names:
            running.add(request(f"{name}{number}", [name], 4 * PER_CHUNK))
            running.drain()
    return running.totals.loaded_tokens - before


@pytest.mark.parametrize("exclusive", [False, True])
def test_gpu_and_tier_hold_more_together_when_exclusive(exclusive: bool) -> None:
    """Eight chunks of GPU and eight of tier: three prefixes of four fit only if none is twice."""
    side = scheduler_side(chunks=8, exclusive=exclusive, store_horizon=0)
    running = engine(32, side)
    rounds(running, "abc", 2)
    computed = running.totals.computed_tokens
    rounds(running, "abc", 4)
    again = running.totals.computed_tokens - computed
    assert running.wrong == []
    least = 12 * BLOCK  # of each prompt the last block is computed in any case
    assert again >= least
    if exclusive:
        assert again <= 2 * least


def test_decoded_chunks_are_encoded_again_only_if_nobody_has_them() -> None:
    side = scheduler_side(chunks=5, exclusive=True, store_horizon=0)
    running = engine(32, side)
    rounds(running, "abc", 6)
    counted = counters(side)
    assert counted["reencoded_chunks"] > 0
    assert counted["reencoded_chunks"] < running.totals.encoded_records
    roomy = engine(32, scheduler_side(chunks=64, exclusive=True, store_horizon=0))
    rounds(roomy, "abc", 6)
    assert "reencoded_chunks" not in counters(roomy.side)
    assert roomy.totals.encoded_records == 12


def test_what_is_on_disk_is_not_encoded_again(tmp_path: Any) -> None:
    side = scheduler_side(exclusive=True, store_horizon=0, disk_path=str(tmp_path))
    running = engine(32, side)
    asked = fill(running, "a", 4)
    on_disk = [(key, 0, 4096) for key in keys(asked)[:2]]
    side.apply_report(WorkerReport(0, disk_stored=on_disk), None)  # type: ignore[arg-type]
    fill(running, "b", 8)
    assert set(running.memory) == set(keys(asked)[2:])
    assert "dropped_stores/overwritten" not in counters(side)


@pytest.mark.parametrize("chunks", [8, 16, 24])
def test_a_step_that_gives_up_the_whole_cache_loses_nothing(chunks: int) -> None:
    """Also where the cache holds more than memory, as long as there is a disk."""
    disk = {"disk_path": "/not/used", "disk_bytes": "1GiB"}
    side = scheduler_side(chunks=chunks, store_policy="auto", store_horizon=0, **disk)
    running = engine(64 * PER_CHUNK, side)
    first = [key for name in "abcdefgh" for key in keys(fill(running, name, 6))]
    counters(side)
    running.pool.reset_prefix_cache()
    fill(running, "x", 1)
    counted = counters(side)
    assert counted.get("dropped_stores/tier_full", 0) == 0
    assert running.wrong == []
    lost = [key for key in first if key not in running.memory and key not in running.disk]
    assert lost == []


def test_what_is_put_off_without_a_disk_is_not_stored_twice() -> None:
    """A memory that is much smaller than the engine's cache has no room, also not for moments."""
    encoded = {}
    for policy in ("eager", "auto"):
        side = scheduler_side(chunks=8, store_policy=policy, store_horizon=0)
        running = engine(64 * PER_CHUNK, side)
        for _ in range(3):
            for name in "abcdefghijklmnop":
                fill(running, name, 6)
        encoded[policy] = running.totals.encoded_records
        assert running.wrong == []
    assert encoded["auto"] <= 0.9 * encoded["eager"]


def test_memory_that_had_to_evict_has_room_when_half_of_it_is_free() -> None:
    index = TierIndex(1600, 1, LRUPolicy(1600))
    tier = TierView(index, None, 1)
    names = [bytes([n]) for n in range(17)]
    for name in names[:14]:
        assert tier.has_room
        assert index.reserve(name, 100)  # type: ignore[arg-type]
        index.commit(name, 0, 100)  # type: ignore[arg-type]
    assert tier.has_room
    index.reserve(names[14], 100)  # type: ignore[arg-type]
    assert not tier.has_room
    index.commit(names[14], 0, 1)  # type: ignore[arg-type]
    for name in names[:6]:
        index.discard(name)  # type: ignore[arg-type]
        assert not tier.has_room
    index.discard(names[6])  # type: ignore[arg-type]
    assert tier.has_room
    # A large reservation that is gone by the time of the question.
    index.reserve(names[15], 850)  # type: ignore[arg-type]
    index.abandon(names[15], 0)  # type: ignore[arg-type]
    assert index.evictions == 0
    assert tier.has_room
    index.reserve(names[15], 950)  # type: ignore[arg-type]
    index.abandon(names[15], 0)  # type: ignore[arg-type]
    assert index.evictions > 0
    assert not tier.has_room


@pytest.mark.parametrize(
    ("extra", "loads", "policy"),
    [
        ({}, True, "auto"),
        ({}, False, "eager"),
        ({"disk_path": "/cache"}, True, "eager"),
        ({"codec": "kvtc2", "degrade": "memory"}, True, "eager"),
        ({"disk_path": "/cache", "exclusive": True}, True, "auto"),
        ({"disk_path": "/cache", "store_policy": "auto"}, True, "auto"),
        ({"store_policy": "on_evict"}, False, "on_evict"),
        ({"store_policy": "eager"}, True, "eager"),
    ],
)
def test_the_policy_that_is_not_given(extra: dict[str, Any], loads: bool, policy: str) -> None:
    config = load_config(extra)
    assert chosen_policy(config, loads) == policy
    tier = TierView(TierIndex(1 << 20, 1, LRUPolicy(1 << 20)), None, 1)
    one = CacheGeometry((GROUP,), 1)
    made = make_timing(config, one, tier, BlockReuse(0), lambda *counted: None, None, loads)
    kinds = {"eager": Eager, "auto": Auto, "on_evict": OnEvict}
    assert type(made) is kinds[policy]
    # Several cache groups get what is asked for, and nothing new by default.
    two = CacheGeometry((GROUP, GROUP), 1)
    several = make_timing(config, two, tier, BlockReuse(0), lambda *counted: None, None, loads)
    given = config.store_policy is not None or config.exclusive
    assert type(several) is (kinds[policy] if given else Eager)
