"""Every family in a real vLLM: what is reloaded is what vLLM's own cache would have given."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.connector.engine import metrics
from tests.hybrid.families import FAMILIES
from tests.hybrid.running import (
    RAW,
    ask,
    cache_groups,
    difference,
    loading_zeros,
    prompts,
    records,
    start,
)

pytestmark = pytest.mark.vllm

TOKENS = 650
"""vLLM's own cache and the tier both end at 640, so that the same shapes are computed."""
HIT = 640
CHUNKS = HIT // 128
SAME, DIFFERENT = 1e-5, 1e-3
"""Of logprobs in float32."""


ALWAYS = ("gemma3", "gptoss", "llama4")
"""Windows, learnt sinks, local chunks; `make test-families` runs the others, too."""


def chosen(family: str) -> object:
    """Every engine takes half a minute."""
    every = pytest.mark.skipif(
        family not in ALWAYS and os.environ.get("KVTC_FAMILIES") != "all",
        reason="make test-families runs all families",
    )
    return pytest.param(family, marks=every)


@pytest.mark.parametrize("family", map(chosen, FAMILIES))
def test_a_reload_equals_a_prefix_hit(family: str, family_model: Callable[[str], Path]) -> None:
    texts = prompts(2, TOKENS)
    with start(family_model(family), RAW) as llm:
        computed = ask(llm, texts)
        hit = ask(llm, texts)
        assert difference(hit, computed) < SAME
        assert metrics(llm).get("kvtc_hit_tokens", 0) == 0

        assert llm.reset_prefix_cache()
        assert difference(ask(llm, texts), hit) < SAME
        values = metrics(llm)
        assert values["kvtc_hit_tokens"] == values["external_prefix_cache_hits"] == 2 * HIT
        assert not any(values[name] for name in values if name.startswith("kvtc_failed_loads"))

        groups = cache_groups(llm)
        for group in range(groups):
            assert llm.reset_prefix_cache()
            with loading_zeros(group):
                assert difference(ask(llm, texts), hit) > DIFFERENT
        assert metrics(llm)["kvtc_hit_tokens"] == (1 + groups) * 2 * HIT

        if groups > 1:
            assert records(llm, 0) == 2 * CHUNKS
            # A window of one chunk, one more before the boundary that the same prompt needs. Of
            # local chunks only the one that the boundary lies in.
            assert records(llm, 1) == 2 * (1 if family == "llama4" else 2)
