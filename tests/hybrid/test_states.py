"""Recurrent layers in a real vLLM: a prefix goes on from the states at its end, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import metrics
from tests.hybrid.families import STATES
from tests.hybrid.running import (
    RAW,
    ask,
    by_kind,
    cache_groups,
    difference,
    loading_zeros,
    prompts,
    start,
)

pytestmark = pytest.mark.vllm

SAME, DIFFERENT, ROUNDED = 1e-5, 1e-4, 0.05
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3next": {"dtype": "bfloat16"},
}
"""What vLLM's CPU build needs besides."""

ALWAYS = ("granite", "falcon", "qwen3next", "lfm2")
WHOLE_BLOCKS = {
    # The CPU build keeps no states inside a step, so a step is at most a block.
    "max_num_batched_tokens": 256,
    "block_size": 256,
    "max_model_len": 2048,
    "enable_prefix_caching": True,
}


def each(llm: Any, texts: list[list[int]]) -> list[Any]:
    """Answers one by one: amplified models round differently in batches of another size."""
    return [answer for text in texts for answer in ask(llm, [text])]


def boundary(llm: Any) -> int:
    """Tokens per chunk, which follow vLLM's blocks."""
    core = llm.llm_engine.engine_core.engine_core
    return int(core.scheduler.connector._config.chunk_tokens)


def chosen(family: str) -> object:
    """Every engine takes half a minute."""
    every = pytest.mark.skipif(
        family not in ALWAYS and os.environ.get("KVTC_FAMILIES") != "all",
        reason="make test-families runs all families",
    )
    return pytest.param(family, marks=every)


@pytest.mark.parametrize("family", map(chosen, STATES))
def test_a_reload_equals_a_prefix_hit(family: str, family_model: Callable[[str], Path]) -> None:
    options = WHOLE_BLOCKS | OPTIONS.get(family, {})
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
        # A chunk of attention per chunk of a prompt, of every kind of state the last one.
        loaded = by_kind(llm, "loaded_chunks")
        assert (loaded["full"], loaded["state"]) == (2 * 2, 2)
        for name in ("loaded_chunks", "loaded_bytes", "stored_bytes"):
            kinds = by_kind(llm, name)
            assert min(kinds["full"], kinds["state"]) > 0
            assert sum(kinds.values()) == values[f"kvtc_{name}"]
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


@pytest.mark.skipif(os.environ.get("KVTC_FAMILIES") != "all", reason="make test-families runs it")
def test_rounded_states_are_nearly_those_that_were_computed(
    family_model: Callable[[str], Path],
) -> None:
    """Granite's states are float32 here, in a model that was made to depend on them."""
    model, sizes = family_model("granite"), []
    for codec in ("exact", "bf16"):
        with start(model, RAW | {"state_codec": codec}, **WHOLE_BLOCKS) as llm:
            texts = prompts(2, 2 * boundary(llm) + 40)
            each(llm, texts)
            hit = each(llm, texts)
            assert llm.reset_prefix_cache()
            changed = difference(each(llm, texts), hit)
            values = metrics(llm)
            assert values["kvtc_hit_tokens"] == 2 * 2 * boundary(llm)
            assert (changed < SAME) == (codec == "exact")
            assert changed < ROUNDED
            raw, stored = (by_kind(llm, f"stored_{n}")["state"] for n in ("raw_bytes", "bytes"))
            sizes.append(stored / raw)
    exact, rounded = sizes
    assert exact < 0.95, "planes of signs and exponents compress"
    assert rounded < 0.55 * exact + 0.05
