"""`degrade` in a live engine. By `make test-joint`: it calibrates the model for codec 2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import texts
from tests.connector.test_joint_delta_engine import TOKENS, extra, reloaded

__all__ = ["extra"]  # a fixture

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(os.environ.get("KVTC_JOINT") != "1", reason="takes a calibration"),
]


def test_memory_that_is_too_small_keeps_more(reference_model: Path, extra: dict[str, Any]) -> None:
    prompts = texts(reference_model, count=8, tokens=TOKENS)
    _, _, roomy = reloaded(reference_model, extra, prompts)
    assert roomy.get("kvtc_evicted_chunks", 0) == 0
    small = {**extra, "memory_bytes": int(0.6 * roomy["kvtc_tier_used_bytes"])}
    _, _, off = reloaded(reference_model, small, prompts)
    _, answers, on = reloaded(reference_model, {**small, "degrade": "memory"}, prompts)
    assert off["kvtc_evicted_chunks"] > on.get("kvtc_evicted_chunks", 0)
    assert on["kvtc_loaded_tokens"] > off.get("kvtc_loaded_tokens", 0)
    assert on["kvtc_halved_bytes"] > 0
    assert sum(on.get(f"kvtc_halved_chunks/{times}", 0) for times in (1, 2)) > 0
    loaded = [on.get(f"kvtc_halved_loaded_chunks/{times}", 0) for times in range(3)]
    assert sum(loaded) == on["kvtc_loaded_chunks"]
    assert sum(loaded[1:]) > 0
    assert on.get("kvtc_failed_loads", 0) == 0
    assert len(answers) == 8 * len(prompts)
