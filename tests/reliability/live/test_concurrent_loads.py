"""Many loads at once, some of them interrupted.

Of one prefix the tier gives every chunk once, as vLLM alone would compute it once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import engine, greedy, metrics, worker_arena
from tests.reliability.live.conftest import ANSWER, Tokens
from tests.reliability.live.stepping import HELD_STEPS, Run, count, held_loads, raw, used_blocks

pytestmark = pytest.mark.vllm

REQUESTS = 6
CHUNKS = 5
"""Of a prompt of 640 tokens; of the last one, 96 tokens are loaded."""
SHARED = 512
OPTIONS: dict[str, Any] = {"num_gpu_blocks_override": 256}
"""Room for everybody to have the prefix for himself, so that whoever does is seen."""


@pytest.fixture(scope="module")
def tails(prompts: Tokens) -> Tokens:
    """One prefix of four chunks, then two chunks each of their own."""
    return [prompts[0][:SHARED] + other[:256] for other in prompts]


@dataclass(frozen=True)
class Alone:
    """What vLLM alone says to requests that come at once, and the most blocks that they take."""

    answers: Tokens
    blocks: int


@pytest.fixture(scope="module")
def alone(reference_model: Path, prompts: Tokens, tails: Tokens) -> dict[str, Alone]:
    asked = {
        "same": prompts[:1] * REQUESTS,
        "tails": tails,
        "new tails": tails[1:],
        "different": prompts,
    }
    found = {}
    with engine(reference_model, None, **OPTIONS) as llm:
        for name, requests in asked.items():
            assert llm.reset_prefix_cache()
            run = Run(llm)
            run.add(requests, ANSWER)
            found[name] = Alone(run.finish(), run.peak)
    assert found["same"].blocks < 2 * 640 // 32, "vLLM itself shares a prefix within a step"
    return found


@pytest.fixture(scope="module")
def llm(reference_model: Path, alone: dict[str, Alone]) -> Iterator[Any]:
    """One engine for all; every test resets the tier, and fills it with what it needs.

    alone: a process has one engine at a time.
    """
    with engine(reference_model, raw(), **OPTIONS) as made:
        yield made


class Growth:
    """How much our counters have grown since this was made."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.before = metrics(llm)

    def of(self, name: str) -> float:
        return count(self.llm, name) - self.before.get(f"kvtc_{name}", 0)


def fill(llm: Any, prompts: Tokens, chunks: int) -> Growth:
    """From now on the tier has the chunks of these prompts, and nobody anything else."""
    assert llm.reset_prefix_cache(reset_connector=True)
    since = Growth(llm)
    for prompt in prompts:
        greedy(llm, [prompt], 1)
    assert since.of("stored_chunks") == chunks
    assert llm.reset_prefix_cache()
    return Growth(llm)


def run_at_once(llm: Any, prompts: Tokens) -> Run:
    """All requests have come, and have got as far as they get, before the first load ends."""
    run = Run(llm)
    with held_loads():
        run.add(prompts, ANSWER)
        run.step_until_loads(1)
        run.step(HELD_STEPS)
    run.finish()
    return run


def test_six_requests_of_one_prompt_load_it_once(
    llm: Any, prompts: Tokens, alone: dict[str, Alone]
) -> None:
    since, idle = fill(llm, prompts[:1], CHUNKS), used_blocks(llm)
    run = run_at_once(llm, prompts[:1] * REQUESTS)
    assert run.finish() == alone["same"].answers
    assert since.of("loaded_chunks") == CHUNKS
    assert since.of("shared_load_waits") == REQUESTS - 1
    assert run.peak <= alone["same"].blocks
    assert used_blocks(llm) == idle


def test_six_requests_of_one_prefix_load_it_once_and_then_their_own_tails(
    llm: Any, tails: Tokens, alone: dict[str, Alone]
) -> None:
    distinct = SHARED // 128 + REQUESTS * 2
    since, idle = fill(llm, tails, distinct), used_blocks(llm)
    run = run_at_once(llm, tails)
    assert run.finish() == alone["tails"].answers
    assert since.of("loaded_chunks") == distinct
    assert since.of("shared_load_waits") == REQUESTS - 1
    assert run.peak <= alone["tails"].blocks
    assert used_blocks(llm) == idle


def test_five_requests_of_one_prefix_load_it_once_and_compute_their_own_tails(
    llm: Any, prompts: Tokens, tails: Tokens, alone: dict[str, Alone]
) -> None:
    """In the tier the prefix goes on in a way that is nobody's."""
    since, idle = fill(llm, prompts[:1], CHUNKS), used_blocks(llm)
    run = run_at_once(llm, tails[1:])
    assert run.finish() == alone["new tails"].answers
    assert since.of("loaded_chunks") == SHARED // 128
    assert since.of("shared_load_waits") == REQUESTS - 2
    assert run.peak <= alone["new tails"].blocks
    assert used_blocks(llm) == idle


def test_others_go_on_when_the_request_that_loads_for_all_is_aborted(
    llm: Any, prompts: Tokens, alone: dict[str, Alone]
) -> None:
    since, idle, run = fill(llm, prompts[:1], CHUNKS), used_blocks(llm), Run(llm)
    with held_loads():
        run.add(prompts[:1] * REQUESTS, ANSWER)
        run.step_until_loads(1)
        run.abort(0)
        run.step(HELD_STEPS)
    assert run.finish() == alone["same"].answers[1:]
    # vLLM keeps the blocks of the aborted one until its load has ended: at most once more.
    assert since.of("loaded_chunks") <= 2 * CHUNKS
    assert run.peak <= alone["same"].blocks + 608 // 32
    assert used_blocks(llm) == idle


def test_others_go_on_when_the_chunk_that_is_loaded_for_all_is_damaged(
    llm: Any, prompts: Tokens, alone: dict[str, Alone]
) -> None:
    since, idle = fill(llm, prompts[:1], CHUNKS), used_blocks(llm)
    arena = worker_arena()
    first = arena.keys()[0]
    blob = bytearray(arena.read(first))
    blob[len(blob) // 2] ^= 1
    assert arena.write(first, bytes(blob))
    run = run_at_once(llm, prompts[:1] * REQUESTS)
    assert run.finish() == alone["same"].answers
    assert since.of("failed_loads") >= 1
    # What was computed instead is stored.
    assert llm.reset_prefix_cache()
    since = Growth(llm)
    assert greedy(llm, prompts[:1], ANSWER) == alone["same"].answers[:1]
    assert since.of("loaded_chunks") == CHUNKS
    assert used_blocks(llm) == idle


def check_nothing_is_left(llm: Any, blocks: int) -> None:
    """No block, no chunk that only one side knows."""
    assert used_blocks(llm) == blocks
    assert worker_arena().used == count(llm, "tier_used_bytes") == count(llm, "tier_reserved_bytes")


def test_requests_that_are_aborted_while_they_load_leave_nothing(
    llm: Any, prompts: Tokens, alone: dict[str, Alone]
) -> None:
    answers = alone["different"].answers
    since, idle, run = fill(llm, prompts[:4], 4 * CHUNKS), used_blocks(llm), Run(llm)
    with held_loads():
        run.add(prompts[:4], ANSWER)
        run.step_until_loads(4)
        run.abort(0)
        run.abort(2)
        run.step(HELD_STEPS)
        assert used_blocks(llm) >= idle + 4 * 608 // 32, "blocks that are written to are free"
    assert run.finish() == [answers[1], answers[3]]
    assert since.of("hit_tokens") == 4 * 608
    assert since.of("loaded_tokens") >= 2 * 608
    # Also what was aborted is right afterwards.
    llm.reset_prefix_cache()
    assert greedy(llm, prompts[:4], ANSWER) == answers[:4]
    check_nothing_is_left(llm, idle)


def test_a_reset_while_requests_load_forgets_and_breaks_nothing(
    llm: Any, prompts: Tokens, alone: dict[str, Alone]
) -> None:
    answers = alone["different"].answers
    _, idle, run = fill(llm, prompts[:4], 4 * CHUNKS), used_blocks(llm), Run(llm)
    with held_loads():
        run.add(prompts[:4] + prompts[:2], ANSWER)  # two of them wait for others' loads
        run.step_until_loads(4)
        llm.reset_prefix_cache(reset_connector=True)
        run.step(HELD_STEPS)
    assert run.finish() == answers[:4] + answers[:2]
    since = Growth(llm)
    for hits in (0, 2 * 608):  # new prompts are stored and found again
        llm.reset_prefix_cache()
        assert greedy(llm, prompts[4:], ANSWER) == answers[4:]
        assert since.of("hit_tokens") == hits
    check_nothing_is_left(llm, idle)
