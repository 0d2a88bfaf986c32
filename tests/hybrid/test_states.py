"""Recurrent layers in a real vLLM: a prefix goes on from the states at its end, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import metrics
from tests.hybrid.families import STATES
from tests.hybrid.running import (
    RAW,
    ask,
    cache_groups,
    difference,
    loading_zeros,
    prompts,
    start,
)

pytestmark = pytest.mark.vllm

SAME, DIFFERENT = 1e-5, 1e-4
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3next": {"dtype": "bfloat16"},
}
"""What vLLM's CPU build needs besides."""


def each(llm: Any, texts: list[list[int]]) -> list[Any]:
    """Answers one by one: amplified models round differently in batches of another size."""
    return [answer for text in texts for answer in ask(llm, [text])]


def boundary(llm: Any) -> int:
    """Tokens per chunk, which follow vLLM's blocks."""
    core = llm.llm_engine.engine_core.engine_core
    return int(core.scheduler.connector._config.chunk_tokens)


@pytest.mark.parametrize("family", STATES)
def test_a_reload_equals_a_prefix_hit(family: str, family_model: Callable[[str], Path]) -> None:
    # The CPU build keeps no states inside a step, so a step is at most a block.
    options = {"max_num_batched_tokens": 256, "block_size": 256, "max_model_len": 2048}
    options |= {"enable_prefix_caching": True, **OPTIONS.get(family, {})}
    with start(family_model(family), RAW, **options) as llm:
        length = boundary(llm)
        texts = prompts(2, 2 * length + 40)
        each(llm, texts)
        hit = each(llm, texts)
        assert metrics(llm).get("kvtc_hit_tokens", 0) == 0
        assert metrics(llm)["prefix_cache_hits"] == 2 * 2 * length

        assert llm.reset_prefix_cache()
        assert difference(each(llm, texts), hit) < SAME
        values = metrics(llm)
        assert values["kvtc_hit_tokens"] == 2 * 2 * length
        assert not any(values[name] for name in values if name.startswith("kvtc_failed_loads"))
        for group in range(cache_groups(llm)):
            assert llm.reset_prefix_cache()
            with loading_zeros(group):
                assert difference(each(llm, texts), hit) > DIFFERENT

        # The next turn goes on from the states of the answer.
        (answer,) = ask(llm, texts[:1], tokens=length + 20)
        turn = texts[0] + answer.tokens + prompts(1, 30, seed=1)[0]
        assert llm.reset_prefix_cache()
        before = metrics(llm)["kvtc_hit_tokens"]
        loaded = ask(llm, [turn])
        assert metrics(llm)["kvtc_hit_tokens"] - before == 3 * length
        assert difference(ask(llm, [turn]), loaded) < SAME
