"""No request waits for its load longer than its recomputation would have taken.

On the model of an engine: bursts of stored prompts, a tier of any pace, known or not, that may
change its pace between or within bursts.
"""

from __future__ import annotations

import statistics

import pytest

from kvtc_vllm.offload.load_policy import PROBE_EVERY
from tests.connector.engine_model import (
    BATCHES,
    CHUNK,
    PREFILL,
    PROMPT,
    STEP,
    STEP_SECONDS,
    THREADS,
    Engine,
    Prompt,
)

STEP_ENDS = 1.08
"""What the engine sees at the end of a step may have been so a short step before."""


class Tier:
    """Its pace, as a multiple of what computing takes per token."""

    def __init__(self, pace: float) -> None:
        self.slowness = pace
        self.later = pace
        self.changes = self.ends = float("inf")

    def __call__(self, now: float) -> float:
        return PREFILL * (self.later if self.changes <= now < self.ends else self.slowness)

    def change(self, pace: float, at: float, until: float = float("inf")) -> None:
        self.later, self.changes, self.ends = pace, at, until


def served(tier: Tier, loads: int = 9) -> Engine:
    """An engine that has computed, and loaded one prompt after another."""
    engine = Engine(tier)
    engine.serve(6, stored=False)
    for _ in range(loads):
        engine.serve(1)
    return engine


def longest_wait(burst: list[Prompt]) -> float:
    """As a multiple of what recomputing would have taken."""
    return max(
        (prompt.waited / prompt.recomputed for prompt in burst if prompt.recomputed), default=0
    )


def late(burst: list[Prompt]) -> int:
    """How many waited longer than for their recomputation."""
    return sum(prompt.waited > prompt.recomputed for prompt in burst if prompt.recomputed)


def chunk_of(slowness: float) -> float:
    """Time in which a thread loads one, in full steps."""
    return slowness * THREADS * CHUNK / STEP


def mean_first_token(burst: list[Prompt]) -> float:
    """Against the same burst computed."""
    computed = [(n + 1) * PROMPT * PREFILL for n in range(len(burst))]
    return statistics.mean(p.first_token for p in burst) / statistics.mean(computed)


@pytest.mark.parametrize("requests", [1, 4, 32, 64])
@pytest.mark.parametrize("slowness", [0.4, 0.7, 0.9, 1.1, 1.3, 2, 3, 10])
def test_a_tier_of_known_pace_keeps_nobody_waiting(slowness: float, requests: int) -> None:
    burst = served(Tier(slowness)).serve(requests)
    # Those that are tried against expectation, and what the first of them meets.
    assert late(burst) <= (
        requests // PROBE_EVERY if slowness < 10 else 1 + requests // PROBE_EVERY
    )
    assert longest_wait(burst) <= 1 + chunk_of(slowness)
    if requests > 1:
        # Of one step: a load that is not offered costs the time that steps have in common.
        assert mean_first_token(burst) <= 1.3 if slowness >= 2 else mean_first_token(burst) <= 0.8


@pytest.mark.parametrize("requests", [32, 64])
def test_a_fast_tier_loads_all_of_a_burst(requests: int) -> None:
    burst = served(Tier(0.4)).serve(requests)
    assert all(prompt.recomputed and not prompt.given_up for prompt in burst)
    assert mean_first_token(burst) < 0.5


@pytest.mark.parametrize("requests", [8, 32, 64])
@pytest.mark.parametrize("slowness", [1.1, 1.3, 2, 5, 20])
def test_a_tier_that_became_slow_is_left_before_it_costs(slowness: float, requests: int) -> None:
    tier = Tier(0.3)
    engine = served(tier)
    tier.change(slowness, engine.now)
    # The engine ends the step in which it learns it, and a thread the chunk that it reads.
    burst = engine.serve(requests)
    assert longest_wait(burst) <= (STEP_ENDS if slowness <= 2 else 2 + chunk_of(slowness))
    assert late(burst) <= THREADS
    assert mean_first_token(burst) <= 1.2
    again = engine.serve(requests)
    assert late(again) <= requests // PROBE_EVERY
    assert longest_wait(again) <= 1 + chunk_of(slowness)
    assert sum(prompt.given_up for prompt in again) <= THREADS + requests // PROBE_EVERY


@pytest.mark.parametrize("slowness", [1.3, 2, 5, 20])
def test_a_tier_that_becomes_slow_within_a_burst_is_left(slowness: float) -> None:
    tier = Tier(0.3)
    engine = served(tier)
    tier.change(slowness, engine.now + 1)
    burst = engine.serve(64)
    assert longest_wait(burst) <= STEP_ENDS
    assert late(burst) <= THREADS
    assert mean_first_token(burst) < 0.85


@pytest.mark.parametrize("requests", [8, 64])
@pytest.mark.parametrize("slowness", [0.4, 1.1, 2, 20])
def test_a_tier_of_unknown_pace_is_given_few_loads(slowness: float, requests: int) -> None:
    burst = served(Tier(slowness), loads=0).serve(requests)
    assert late(burst) <= THREADS + requests // PROBE_EVERY
    assert mean_first_token(burst) <= 1.25


def test_threads_that_stall_once_cost_few_loads() -> None:
    """As where a step takes the processor: what they are at takes long, what follows does not."""
    tier = Tier(0.3)
    engine = served(tier)
    tier.change(12, engine.now + 1, engine.now + 1.02)
    burst = engine.serve(64)
    assert sum(prompt.given_up for prompt in burst) <= 12
    assert mean_first_token(burst) < 0.55


def test_a_tier_that_became_fast_again_is_used() -> None:
    tier = Tier(5)
    engine = served(tier, loads=3)
    engine.serve(32)
    tier.change(0.3, engine.now)
    for _ in range(3):
        engine.serve(16)
    assert mean_first_token(engine.serve(16)) < 0.5


def test_the_model_computes_and_loads_as_it_says() -> None:
    computed = Engine(Tier(1)).serve(4, stored=False)
    assert computed[0].first_token == pytest.approx(STEP * PREFILL + STEP_SECONDS)
    loaded = served(Tier(0.3)).serve(1)[0]
    longest = (BATCHES[0] + BATCHES[2]) * CHUNK * THREADS * 0.3 * PREFILL
    assert longest <= loaded.waited <= longest + 2 * STEP_SECONDS
