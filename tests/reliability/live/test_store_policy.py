"""Stores put off until vLLM evicts: every answer is vLLM's own, and nothing comes too late.

Also run on an older vLLM, which calls the connector in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import engine, greedy, metrics
from tests.reliability.live.conftest import ANSWER, Tokens
from tests.reliability.live.stepping import chunk_files, count, raw

pytestmark = pytest.mark.vllm

CHUNKS = 5
"""Of a prompt."""


def late(directory: Path | None = None, **changes: Any) -> dict[str, Any]:
    return raw(directory, store_policy="on_evict", **changes)


def overwritten(llm: Any) -> float:
    return metrics(llm).get("kvtc_dropped_stores/overwritten", 0)


@pytest.mark.parametrize("policy", ["on_evict", "auto"])
def test_eviction_preemption_and_asynchronous_scheduling(
    reference_model: Path, prompts: Tokens, plain: Callable[..., Tokens], policy: str
) -> None:
    """Too few blocks for four requests, too little memory for their chunks."""
    tight = {
        "max_model_len": 1024,
        "num_gpu_blocks_override": 64,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 4,
        "async_scheduling": True,
    }
    with engine(reference_model, None) as llm:
        expected = greedy(llm, prompts, 64)
    extra = late(memory_bytes=12 << 20, exclusive=True) | {"store_policy": policy}
    with engine(reference_model, extra, **tight) as llm:
        for _ in range(3):
            assert greedy(llm, prompts, 64) == expected
        assert metrics(llm)["num_preemptions"] > 0
        assert count(llm, "loaded_tokens") > 0
        assert count(llm, "evicted_chunks") > 0
        assert overwritten(llm) == 0


def test_what_the_engine_holds_is_not_stored_and_one_step_takes_all_of_it(
    reference_model: Path, prompts: Tokens, before: Tokens
) -> None:
    long = [[*prompts[3], *prompts[4], *prompts[5]]]
    options = {"num_gpu_blocks_override": 72, "max_num_batched_tokens": 2048}
    with engine(reference_model, late(store_horizon=0), **options) as llm:
        assert greedy(llm, prompts[:3], ANSWER) == before[:3]
        assert greedy(llm, prompts[:3], ANSWER) == before[:3]
        assert count(llm, "stored_chunks") == 0
        greedy(llm, long, 1)
        stored = count(llm, "stored_chunks")
        assert stored == count(llm, "late_stores") >= 3 * CHUNKS - 4
        assert overwritten(llm) == 0
        assert greedy(llm, prompts[:3], ANSWER) == before[:3]
        assert count(llm, "loaded_tokens") >= 2 * 608


def test_a_reset_of_vllm_s_cache_keeps_what_was_put_off(
    reference_model: Path, prompts: Tokens, before: Tokens
) -> None:
    with engine(reference_model, late()) as llm:
        assert greedy(llm, prompts[:2], ANSWER) == before[:2]
        assert count(llm, "stored_chunks") == 0
        llm.reset_prefix_cache()
        assert greedy(llm, prompts[:2], ANSWER) == before[:2]
        llm.reset_prefix_cache()
        assert greedy(llm, prompts[:2], ANSWER) == before[:2]
        # The first step after a reset stores; the first requests were looked up before.
        assert count(llm, "loaded_tokens") >= 2 * 608
        assert overwritten(llm) == 0


@pytest.mark.parametrize("write", ["through", "behind"])
def test_a_restart_finds_what_only_the_engine_held(
    reference_model: Path, prompts: Tokens, before: Tokens, tmp_path: Path, write: str
) -> None:
    with engine(reference_model, late(tmp_path, disk_write=write)) as llm:
        assert greedy(llm, prompts[:3], ANSWER) == before[:3]
        assert count(llm, "stored_chunks") == 0
        assert chunk_files(tmp_path) == {}
    assert [len(names) for names in chunk_files(tmp_path).values()] == [3 * CHUNKS]
    with engine(reference_model, late(tmp_path, disk_write=write)) as llm:
        assert greedy(llm, prompts[:3], ANSWER) == before[:3]
        assert count(llm, "loaded_tokens") == 3 * 608
        assert count(llm, "failed_loads") == 0


def test_a_lossy_codec_answers_the_same_as_when_it_stores_at_once(
    reference_model: Path, prompts: Tokens
) -> None:
    """What is decoded is the same blob, whenever it was made."""
    found = []
    for policy in ("eager", "on_evict"):
        extra = {"preset": "kvtc-16x", "store_policy": policy}
        with engine(reference_model, extra, num_gpu_blocks_override=72) as llm:
            for batch in (prompts[:3], prompts[3:6], prompts[:3]):
                answers = [greedy(llm, [ids], ANSWER)[0] for ids in batch]
            found.append(answers)
            assert count(llm, "loaded_tokens") > 608
            assert overwritten(llm) == 0
    assert found[0] == found[1]
