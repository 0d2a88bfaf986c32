"""Stores that wait for an eviction, of models with windows, record by record."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.hybrid.pool_engine import CHUNK, PoolEngine, make_request, scheduler_side

pytestmark = pytest.mark.vllm


def text(name: object, chunks: int, more: int = 5) -> list[int]:
    """Tokens of a prompt: the same for the same name."""
    numbers = random.Random(str(name))
    return [numbers.randrange(1000) for _ in range(chunks * CHUNK + more)]


def ask(running: PoolEngine, name: str, prompt: object, chunks: int = 4) -> int:
    return running.ask(make_request(name, text(prompt, chunks)))


def counters(side: Any) -> dict[str, float]:
    """Counts since the last call."""
    stats = side.take_stats()
    return {} if stats is None else stats.data


def group_of(records: Any, group: int) -> int:
    """How many are of a cache group."""
    return sum((key[32:] == b"\x01") == bool(group) for key in records)


def test_what_the_engine_holds_is_not_stored_but_what_it_does_not_keep_is() -> None:
    running = PoolEngine(scheduler_side("on_evict"), 400)
    for name in "abc":
        assert ask(running, name, name) == 0
    assert ask(running, "again", "a") == 4 * CHUNK
    # Full attention waits. vLLM keeps windows before the end of the prompt; ours reach a chunk
    # further back, and what it gives no hash is stored at once.
    assert group_of(running.memory, 0) == 0
    assert 0 < group_of(running.memory, 1) <= 3 * 2
    assert running.wrong == []


@pytest.mark.parametrize("horizon", [0, None])
def test_what_it_gives_up_is_found_in_memory(horizon: int | None) -> None:
    extra = {} if horizon is None else {"store_horizon": horizon}
    running = PoolEngine(scheduler_side("on_evict", **extra), 140)
    ask(running, "a", "a")
    for name in "bcdefgh":
        ask(running, name, name)
    assert ask(running, "again", "a") == 4 * CHUNK
    assert running.wrong == []
    assert "dropped_stores/overwritten" not in counters(running.side)


def test_a_reset_of_vllm_s_cache_loses_nothing() -> None:
    running = PoolEngine(scheduler_side("on_evict"), 400)
    ask(running, "a", "a")
    assert running.reset()
    ask(running, "b", "b")
    assert ask(running, "again", "a") == 4 * CHUNK
    assert running.wrong == []


class Model(RuleBasedStateMachine):
    """Any order of requests and resets, on few blocks. tight: with little room in the tier."""

    @initialize(
        blocks=st.integers(70, 160),
        batch=st.sampled_from([16, 100, 512]),
        horizon=st.sampled_from([None, 0, 3, 64]),
        policy=st.sampled_from(["on_evict", "auto"]),
        delay=st.integers(1, 4),
        tight=st.booleans(),
        retention=st.sampled_from([None, 0]),
    )
    def start(
        self,
        blocks: int,
        batch: int,
        horizon: int | None,
        policy: str,
        delay: int,
        tight: bool,
        retention: int | None,
    ) -> None:
        keys: dict[str, Any] = {} if horizon is None else {"store_horizon": horizon}
        if tight:
            keys |= {"records": 12, "exclusive": True}
        self.side = scheduler_side(policy, **keys)
        self.running = PoolEngine(self.side, blocks, batch, delay, retention)
        self.number = 0

    @rule(
        name=st.integers(0, 3),
        chunks=st.integers(1, 5),
        more=st.integers(0, 40),
        answer=st.integers(0, 40),
    )
    def ask(self, name: int, chunks: int, more: int, answer: int) -> None:
        self.number += 1
        tokens = text(name, chunks) + text(self.number, 0, more)
        self.running.add(make_request(f"r{self.number}", tokens), answer)

    @precondition(lambda self: self.number)
    @rule(times=st.integers(1, 20))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.running.step()

    @rule()
    def reset_vllm_s_cache(self) -> None:
        self.running.reset()

    @rule()
    def reset_all(self) -> None:
        if self.running.reset():
            self.side.reset()

    @invariant()
    def nothing_wrong_is_stored_or_computed_from(self) -> None:
        if hasattr(self, "running"):
            assert self.running.wrong == []
            assert "dropped_stores/overwritten" not in counters(self.side)

    def teardown(self) -> None:
        if hasattr(self, "running"):
            self.running.drain()
            assert self.running.wrong == []


TestModel = Model.TestCase
EXAMPLES = 100 if os.environ.get("KVTC_FAMILIES") == "all" else 5
TestModel.settings = settings(max_examples=EXAMPLES, stateful_step_count=30, deadline=None)
