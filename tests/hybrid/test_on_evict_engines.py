"""Stores that wait for an eviction, in a real vLLM with several cache groups."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.connector.engine import metrics
from tests.hybrid.running import RAW, ask, by_kind, difference, prompts, start
from tests.hybrid.test_states import OPTIONS, WHOLE_BLOCKS, boundary, each

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        os.environ.get("KVTC_FAMILIES") != "all", reason="make test-families runs these"
    ),
]

TOKENS, HIT = 650, 640
SAME = 1e-5
"""Of logprobs in float32."""
BLOCKS = {"gemma3": 250, "gemma4": 200, "gptoss": 60, "llama4": 200, "mistral": 40}
"""Of the engine's own cache: some prompts take all of it."""


@pytest.mark.parametrize("policy", ["on_evict", "auto"])
@pytest.mark.parametrize("family", BLOCKS)
def test_what_was_evicted_is_reloaded(
    family: str, policy: str, family_model: Callable[[str], Path]
) -> None:
    texts, others = prompts(2, TOKENS), prompts(10, TOKENS, seed=5)
    extra = {**RAW, "store_policy": policy, "exclusive": True}
    options = {"num_gpu_blocks_override": BLOCKS[family], "max_num_seqs": 2}
    with start(family_model(family), extra, **options) as llm:
        ask(llm, texts)
        hit = ask(llm, texts)
        assert metrics(llm).get("kvtc_hit_tokens", 0) == 0
        for other in others:
            ask(llm, [other])
        assert difference(ask(llm, texts), hit) < SAME
        values = metrics(llm)
        assert values["kvtc_hit_tokens"] > 0
        assert values.get("kvtc_dropped_stores/overwritten", 0) == 0
        assert not any(values[name] for name in values if name.startswith("kvtc_failed_loads"))


@pytest.mark.parametrize("family", ["granite", "falcon", "qwen3next", "lfm2"])
def test_states_that_were_evicted_are_reloaded(
    family: str, family_model: Callable[[str], Path]
) -> None:
    """The models depend on their states (`test_states`)."""
    extra = {**RAW, "store_policy": "on_evict"}
    options = WHOLE_BLOCKS | OPTIONS.get(family, {}) | {"num_gpu_blocks_override": 40}
    with start(family_model(family), extra, **options) as llm:
        texts = prompts(2, 2 * boundary(llm) + 40)
        each(llm, texts)
        hit = each(llm, texts)
        assert metrics(llm).get("kvtc_hit_tokens", 0) == 0
        each(llm, prompts(14, 2 * boundary(llm) + 40, seed=5))
        assert difference(each(llm, texts), hit) < SAME
        values = metrics(llm)
        assert values["kvtc_hit_tokens"] > 0
        assert by_kind(llm, "loaded_chunks")["state"] > 0
        assert not any(values[name] for name in values if name.startswith("kvtc_failed_loads"))
