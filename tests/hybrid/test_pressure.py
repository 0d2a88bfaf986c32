"""Engines of models with windows that run out of blocks, of tier or of life."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.connector.engine import metrics
from tests.hybrid.running import RAW, ask, difference, prompts, start

pytestmark = pytest.mark.vllm

SAME = 1e-4
"""Of logprobs in float32, where a prefix is computed in other pieces."""
SMALL = {"num_gpu_blocks_override": 90, "max_num_batched_tokens": 256, "max_num_seqs": 4}
"""Fewer blocks than four requests need: eviction, chunked prefill and preemption at once."""


def test_eviction_preemption_and_chunked_prefill(family_model: Callable[[str], Path]) -> None:
    model, texts = family_model("gemma2"), prompts(6, 600, seed=8)
    with start(model, None) as plain:
        expected = ask(plain, texts, tokens=96)
    with start(model, RAW, **SMALL) as llm:
        assert difference(ask(llm, texts, tokens=96), expected) < SAME
        stored = metrics(llm)
        assert stored["kvtc_stored_chunks"] >= 6 * 4
        assert difference(ask(llm, texts, tokens=96), expected) < SAME
        values = metrics(llm)
        assert values["num_preemptions"] > 0
        assert values["kvtc_hit_tokens"] >= 6 * 256
        assert not any(values[name] for name in values if name.startswith("kvtc_failed_loads"))


def test_a_small_tier_evicts_and_stays_right(family_model: Callable[[str], Path]) -> None:
    texts = prompts(4, 650, seed=9)
    with start(family_model("gemma3"), {**RAW, "memory_bytes": "6MiB"}) as llm:
        exact = ask(llm, texts)
        for _ in range(2):
            assert llm.reset_prefix_cache()
            assert difference(ask(llm, texts), exact) < SAME
        values = metrics(llm)
        assert values["kvtc_evicted_chunks"] > 0
        assert values["kvtc_hit_tokens"] > 0
        assert values["kvtc_tier_used_bytes"] <= 6 << 20


def test_a_restarted_engine_resumes_from_disk(
    family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    extra = {**RAW, "disk_path": str(tmp_path), "disk_min_free": 0, "load_deadline": 60}
    texts = prompts(2, 650, seed=10)
    with start(family_model("gemma3"), extra) as llm:
        exact = ask(llm, texts)
    with start(family_model("gemma3"), extra) as llm:
        assert difference(ask(llm, texts), exact) < SAME
        values = metrics(llm)
        assert values["kvtc_hit_tokens"] == 2 * 640
        # Five records of full attention and the last one of windows, each.
        assert values["kvtc_promoted_chunks"] == 2 * 6
