"""`degrade` in a live engine. By `make test-joint`: it calibrates the model for codec 2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import engine, metrics, texts
from tests.connector.test_joint_delta_engine import TOKENS, extra, logprobs

__all__ = ["extra"]  # a fixture

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(os.environ.get("KVTC_JOINT") != "1", reason="takes a calibration"),
]


def newest_first(model: Path, extra: dict[str, Any], prompts: list[list[int]]) -> dict[str, float]:
    """Counters after all prompts were computed, and asked again from the last to the first."""
    with engine(model, extra, max_model_len=1024) as llm:
        logprobs(llm, prompts)
        llm.reset_prefix_cache()
        assert len(logprobs(llm, prompts[::-1])) == 8 * len(prompts)
        return metrics(llm)


def test_memory_that_is_too_small_keeps_more(reference_model: Path, extra: dict[str, Any]) -> None:
    prompts = texts(reference_model, count=8, tokens=TOKENS)
    roomy = newest_first(reference_model, extra, prompts)
    assert roomy.get("kvtc_evicted_chunks", 0) == 0
    size = int(0.6 * roomy["kvtc_tier_used_bytes"])
    small = {**extra, "memory_bytes": size, "store_policy": "eager"}
    off = newest_first(reference_model, small, prompts)
    on = newest_first(reference_model, {**small, "degrade": "memory"}, prompts)
    assert off["kvtc_evicted_chunks"] > on.get("kvtc_evicted_chunks", 0)
    assert on["kvtc_loaded_tokens"] > off["kvtc_loaded_tokens"] > 0
    assert on["kvtc_halved_bytes"] > 0
    assert sum(on.get(f"kvtc_halved_chunks/{times}", 0) for times in (1, 2)) > 0
    loaded = [on.get(f"kvtc_halved_loaded_chunks/{times}", 0) for times in range(3)]
    assert sum(loaded) == on["kvtc_loaded_chunks"]
    assert sum(loaded[1:]) > 0
    assert not any(on[name] for name in on if name.startswith("kvtc_failed_loads"))
