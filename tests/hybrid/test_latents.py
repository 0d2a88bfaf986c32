"""Multi-head latent attention in a real vLLM: reloaded, calibrated, served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.connector.engine import metrics
from tests.hybrid.families import LATENTS
from tests.hybrid.running import RAW, ask, difference, loading_zeros, prompts, start

pytestmark = pytest.mark.vllm

SAME, DIFFERENT = 1e-3, 1e-2
"""Of logprobs in float32: behind a prefix, keys and values are made of its latents again."""
BLOCK = 16
TOKENS, HIT = 650, 640


@pytest.mark.parametrize("family", LATENTS)
def test_a_reload_equals_what_was_computed(
    family: str, family_model: Callable[[str], Path]
) -> None:
    """vLLM's CPU build has no prefix cache for these models, so there is no hit to compare with."""
    texts = prompts(2, TOKENS)
    with start(family_model(family), RAW, block_size=BLOCK) as llm:
        computed = ask(llm, texts)
        assert metrics(llm).get("kvtc_hit_tokens", 0) == 0
        loaded = ask(llm, texts)
        values = metrics(llm)
        assert values["kvtc_hit_tokens"] == values["external_prefix_cache_hits"] == 2 * HIT
        assert not any(values[name] for name in values if name.startswith("kvtc_failed_loads"))
        assert difference(loaded, computed) < SAME
        # One latent and one rotated key per layer, in float32.
        assert values["kvtc_stored_raw_bytes"] == 2 * HIT * 4 * (512 + 64) * 4
        with loading_zeros(0):
            assert difference(ask(llm, texts), computed) > DIFFERENT
