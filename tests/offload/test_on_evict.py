"""Chunks are stored when the engine's own cache gives them up: whole, once, and never too late."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from benchmarks.store_policy.engine import BLOCK, SimEngine, SimRequest
from kvtc_vllm.offload.on_evict import BlockReuse
from tests.offload.engines import CHUNK, counters, engine, request, scheduler_side

PER_CHUNK = CHUNK // BLOCK


def fill(running: SimEngine, name: str, chunks: int) -> SimRequest:
    """Run a prompt of so many chunks to its end."""
    asked = request(name, [name], chunks * PER_CHUNK)
    running.add(asked)
    running.drain()
    return asked


def keys(asked: SimRequest) -> list[bytes]:
    return list(asked.hashes[PER_CHUNK - 1 : asked.num_prompt_tokens // BLOCK : PER_CHUNK])


def test_what_the_engine_holds_is_not_stored() -> None:
    running = engine(80)
    for name in "abc":
        fill(running, name, 4)
    fill(running, "a", 4)
    assert running.totals.encoded_records == 0
    assert len(running.side.index) == 0


def test_what_it_gives_up_is_stored_before_it_is_overwritten() -> None:
    running = engine(32, scheduler_side(store_horizon=0))
    first = fill(running, "a", 4)
    fill(running, "b", 4)
    assert running.totals.encoded_records == 0
    fill(running, "c", 2)
    # Whole chunks, the tail of what was used longest ago first.
    assert set(running.memory) == set(keys(first)[2:])
    assert running.wrong == []
    assert counters(running.side)["late_stores"] == 2


def test_it_is_found_there_again() -> None:
    running = engine(32)
    fill(running, "a", 4)
    fill(running, "b", 8)
    before = running.totals.loaded_tokens
    fill(running, "a", 4)
    assert running.totals.loaded_tokens - before > 2 * CHUNK
    assert running.wrong == []


@pytest.mark.parametrize("ahead", [0, 1])
def test_nothing_is_lost_when_one_step_takes_the_whole_pool(ahead: int) -> None:
    running = engine(64, scheduler_side(store_horizon=0), batch=64 * BLOCK, ahead=ahead)
    stored = [key for name in "abcd" for key in keys(fill(running, name, 4))]
    running.add(request("e", ["e"], 64))
    running.step()
    running.settle()
    running.drain()
    assert set(running.memory) == set(stored)
    assert running.wrong == []
    assert "dropped_stores/overwritten" not in counters(running.side)


def test_a_horizon_stores_ahead() -> None:
    running = engine(32, scheduler_side(store_horizon=8))
    first = fill(running, "a", 4)
    fill(running, "b", 4)  # leaves no block that was never used
    running.step()
    running.drain()
    assert set(running.memory) == set(keys(first)[2:])
    assert "late_stores" not in counters(running.side)
    for _ in range(3):  # each chunk once
        running.step()
    assert running.totals.encoded_records == 2


def test_an_idle_engine_ends_where_memory_is_smaller_than_the_horizon() -> None:
    running = engine(32, scheduler_side(chunks=3, store_horizon=32))
    running.add(request("a", ["a"], 4 * PER_CHUNK))
    running.add(request("b", ["b"], 4 * PER_CHUNK))
    for _ in range(60):
        running.step()
    assert not running.busy
    assert 3 <= running.totals.encoded_records <= 8  # each once at most
    assert running.wrong == []


def test_the_horizon_follows_what_steps_take() -> None:
    running = engine(64, batch=16 * BLOCK)
    for name in "abcdefgh":
        fill(running, name, 4)
    found = counters(running.side)
    # After the first steps over full blocks, what comes is known and nothing is late.
    assert found.get("late_stores", 0) <= 2
    assert running.totals.encoded_records >= 8 * 4 - 64 // PER_CHUNK


def test_heads_come_before_tails() -> None:
    running = engine(32, scheduler_side(store_horizon=0), batch=1024)
    fill(running, "a", 4)
    fill(running, "b", 4)
    running.add(request("c", ["c"], 32))
    step = running.side.plan_step  # what the step says, before it runs
    orders: list[Any] = []
    running.side.plan_step = lambda output: orders.append(step(output)) or orders[-1]
    running.step()
    assert [item.start for item in orders[0].stage_first] == [
        start for start in range(0, 4 * CHUNK, CHUNK) for _ in "ab"
    ]


def test_a_head_outlives_its_tail_in_memory() -> None:
    running = engine(16, scheduler_side(chunks=4, store_horizon=0), batch=1024)
    first = fill(running, "a", 4)
    fill(running, "b", 4)
    assert set(running.memory) == set(keys(first))
    running.add(request("c", ["c"], PER_CHUNK))
    running.drain()
    # A chunk of b took the place of a's tail.
    assert [key in running.memory for key in keys(first)] == [True, True, True, False]


def test_what_finds_no_room_is_counted() -> None:
    running = engine(32, scheduler_side(chunks=3, store_horizon=0), batch=1024)
    fill(running, "a", 4)
    fill(running, "b", 4)
    running.add(request("c", ["c"], 16))
    running.drain()
    assert len(running.memory) == 3
    assert counters(running.side)["dropped_stores/tier_full"] == 1


def test_resets_of_vllm_s_cache_lose_nothing() -> None:
    running = engine(32)
    first = fill(running, "a", 4)
    assert running.pool.reset_prefix_cache()
    fill(running, "b", 8)
    assert set(keys(first)) <= set(running.memory)
    assert running.wrong == []


@pytest.mark.parametrize("reuse", [BlockReuse(0, sleeps=True), BlockReuse(8, zeroes=True)])
def test_where_blocks_may_not_keep_what_they_hold_a_reset_loses_it(reuse: BlockReuse) -> None:
    running = engine(32, scheduler_side(reuse=reuse, store_horizon=0))
    fill(running, "a", 4)
    assert running.pool.reset_prefix_cache()
    fill(running, "b", 1)
    assert running.memory == {}
    assert counters(running.side)["dropped_stores/overwritten"] == 4


def test_where_blocks_are_cleared_before_a_step_nothing_is_left_to_the_last_moment() -> None:
    side = scheduler_side(reuse=BlockReuse(8, zeroes=True), store_horizon=0)
    running = engine(32, side, batch=8 * BLOCK)
    for name in "abcdef":
        fill(running, name, 4)
    found = counters(side)
    assert "late_stores" not in found
    assert "dropped_stores/overwritten" not in found
    assert len(running.memory) >= 4 * 4


def test_blocks_whose_load_failed_are_not_stored() -> None:
    running = engine(32, scheduler_side(store_horizon=0))
    fill(running, "a", 4)
    running.pool.evict_blocks(
        [
            running.pool.find(running_hash).block_id  # type: ignore[union-attr]
            for running_hash in sorted(running.held())[:1]
        ]
    )
    fill(running, "b", 8)
    assert len(running.memory) == 3
    assert counters(running.side)["dropped_stores/overwritten"] == 1
    assert running.wrong == []


def test_a_connector_s_reset_forgets_what_was_kept_back() -> None:
    running = engine(32, scheduler_side(store_horizon=0))
    fill(running, "a", 4)
    running.pool.reset_prefix_cache()
    running.side.reset()
    fill(running, "b", 8)
    assert running.memory == {}


def test_a_pool_that_tells_nothing_gets_everything_stored_at_once() -> None:
    side = scheduler_side()

    class OldPool:
        cached_block_hash_to_block = object()

    side.bind_gpu_blocks(OldPool())
    from tests.connector.fakes import FakeRequest, start

    asked = FakeRequest("r", 2 * CHUNK)
    asked.block_hashes = [f"{n}".encode() for n in range(2 * PER_CHUNK)]
    assert len(start(side, asked, list(range(2 * PER_CHUNK)), 2 * CHUNK).stores) == 2


class Model(RuleBasedStateMachine):
    """Any order of requests, ends, aborts and resets, on few blocks.

    tight: with little room in the tier, which then loses chunks, but stores none that is wrong.
    """

    @initialize(
        blocks=st.integers(20, 40),
        ahead=st.integers(0, 1),
        batch=st.sampled_from([BLOCK, 5 * BLOCK, 64 * BLOCK]),
        horizon=st.sampled_from([None, 0, 3, 64]),
        policy=st.sampled_from(["on_evict", "auto"]),
        delay=st.integers(1, 4),
        tight=st.booleans(),
    )
    def start(
        self,
        blocks: int,
        ahead: int,
        batch: int,
        horizon: int | None,
        policy: str,
        delay: int,
        tight: bool,
    ) -> None:
        self.tight = tight
        keys: dict[str, Any] = {"store_horizon": horizon} if horizon is not None else {}
        if tight:
            keys |= {"chunks": 6, "exclusive": True}
        self.side = scheduler_side(store_policy=policy, reuse=BlockReuse(8), **keys)
        self.running = engine(
            blocks, self.side, ahead=ahead, batch=batch, requests=4, encode_steps=delay
        )
        self.asked: list[SimRequest] = []
        self.chunks: dict[bytes, set[bytes]] = {}
        self.number = 0

    @rule(
        path=st.lists(st.integers(0, 2), min_size=1, max_size=3),
        blocks=st.integers(1, 14),
        answer=st.integers(0, 40),
    )
    def ask(self, path: list[int], blocks: int, answer: int) -> None:
        self.number += 1
        asked = request(f"r{self.number}", path, blocks, answer)
        self.asked.append(asked)
        for first in range(0, (blocks * BLOCK + answer) // CHUNK * PER_CHUNK, PER_CHUNK):
            own = asked.hashes[first : first + PER_CHUNK]
            self.chunks[own[-1]] = set(own)
        self.running.add(asked)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.running.step()

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 100))
    def abort(self, which: int) -> None:
        self.running.abort(self.asked[which % len(self.asked)])

    @rule()
    def reset_vllm_s_cache(self) -> None:
        self.running.settle()
        self.running.pool.reset_prefix_cache()
        self.running.step()

    @rule()
    def reset_all(self) -> None:
        self.running.settle()
        if self.running.pool.reset_prefix_cache():
            self.side.reset()
            self.running.filled.clear()

    @invariant()
    def nothing_is_stored_from_overwritten_blocks(self) -> None:
        if hasattr(self, "running"):
            assert self.running.wrong == []

    @invariant()
    def what_was_complete_is_in_the_cache_or_in_the_tier(self) -> None:
        if not hasattr(self, "running"):
            return
        held, is_known = self.running.held(), self.side.index.is_known
        complete = self.running.filled.intersection(self.chunks)
        lost = {key for key in complete if not self.chunks[key] <= held and not is_known(key)}
        assert self.tight or not lost
        assert "dropped_stores/overwritten" not in counters(self.side)

    def teardown(self) -> None:
        if hasattr(self, "running"):
            self.running.drain()


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
