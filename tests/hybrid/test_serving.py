"""What happens to requests of a model with windows: turns, shared prefixes, faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import metrics, worker_arena
from tests.hybrid.running import RAW, ask, difference, prompts, start

pytestmark = pytest.mark.vllm

SAME = 1e-4
"""Of logprobs in float32, where a prefix is computed in other pieces."""


@pytest.fixture(scope="module")
def llm(family_model: Callable[[str], Path]) -> Iterator[Any]:
    """Gemma 3: windows of 128 tokens in five groups, full attention in one."""
    with start(family_model("gemma3"), RAW) as engine:
        yield engine


def hits(llm: Any, texts: list[list[int]], **options: Any) -> tuple[int, list[Any]]:
    """Tokens that the tier gave to these prompts, and the answers; vLLM's own cache is empty."""
    before = metrics(llm).get("kvtc_hit_tokens", 0)
    assert llm.reset_prefix_cache()
    answers = ask(llm, texts, **options)
    return int(metrics(llm)["kvtc_hit_tokens"] - before), answers


def test_the_next_turn_goes_on_behind_the_answer_and_the_same_prompt_before_it(llm: Any) -> None:
    (prompt,) = prompts(1, 650, seed=1)
    (answer,) = ask(llm, [prompt], tokens=150)
    turn = prompt + answer.tokens + prompts(1, 50, seed=2)[0]
    assert hits(llm, [turn], load=False)[0] == 0
    found, loaded = hits(llm, [turn])
    assert found == 6 * 128
    exact = hits(llm, [turn], load=False)[1]
    assert difference(loaded, exact) < SAME
    found, again = hits(llm, [prompt])
    assert found == 5 * 128
    assert difference(again, hits(llm, [prompt], load=False)[1]) < SAME


def test_the_third_prompt_with_a_shared_beginning_goes_on_behind_it(llm: Any) -> None:
    (shared,) = prompts(1, 3 * 128, seed=3)
    first, second, third = (shared + rest for rest in prompts(3, 300, seed=4))
    assert hits(llm, [first])[0] == 0
    assert hits(llm, [second])[0] == 0
    found, loaded = hits(llm, [third])
    assert found == 3 * 128
    assert difference(loaded, hits(llm, [third], load=False)[1]) < SAME


def test_vllms_own_cache_below_and_the_tier_above(llm: Any) -> None:
    (prompt,) = prompts(1, 650, seed=5)
    ask(llm, [prompt])
    exact = hits(llm, [prompt], load=False)[1]
    before = metrics(llm)["kvtc_hit_tokens"]
    assert llm.reset_prefix_cache()
    ask(llm, [prompt[:300]], load=False)
    assert difference(ask(llm, [prompt]), exact) < SAME
    # vLLM has 288 tokens: whole blocks of 32 of the 300.
    assert metrics(llm)["kvtc_hit_tokens"] - before == 640 - 288


@pytest.mark.parametrize("group", [0, 1])
def test_a_damaged_record_costs_the_load_and_no_token(llm: Any, group: int) -> None:
    (prompt,) = prompts(1, 650, seed=6 + group)
    known = set(worker_arena().keys())
    ask(llm, [prompt])
    exact = hits(llm, [prompt], load=False)[1]
    arena = worker_arena()
    mine = [key for key in list(arena.keys()) if key not in known]
    plain = min(len(key) for key in mine)
    damaged = [key for key in mine if (len(key) > plain) == bool(group)][-1]
    blob = bytearray(arena.read(damaged))
    blob[200] ^= 0xFF
    arena.remove([damaged])
    arena.write(damaged, bytes(blob))
    before = metrics(llm)
    found, answers = hits(llm, [prompt])
    values = metrics(llm)
    assert difference(answers, exact) < SAME
    failed = "kvtc_failed_loads/checksum"
    assert values[failed] - before.get(failed, 0) == 1
    # Offered and failed; then the boundary before it was offered.
    assert found == 640 + 512
    # What was computed instead is stored and found again.
    assert hits(llm, [prompt])[0] == 640
