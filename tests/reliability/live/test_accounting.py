"""Counters and roles: who is not looked up for does not count, who has one role plays no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvtc_vllm.config import kv_transfer_config
from tests.connector.engine import drain, engine, greedy
from tests.reliability.live.conftest import ANSWER, Tokens
from tests.reliability.live.stepping import chunk_files, count, raw, settings

pytestmark = pytest.mark.vllm


def test_requests_that_are_not_looked_up_count_apart(
    reference_model: Path, prompts: Tokens, before: Tokens
) -> None:
    with engine(reference_model, raw()) as llm:

        def run(**parameters: Any) -> tuple[float, ...]:
            """Tokens looked up, bypassed and loaded by one request."""
            names = ("lookup_tokens", "bypassed_tokens", "loaded_tokens")
            llm.reset_prefix_cache()
            already = [count(llm, name) for name in names]
            (output,) = llm.generate(
                [{"prompt_token_ids": prompts[0]}], settings(ANSWER, **parameters), use_tqdm=False
            )
            drain(llm)
            assert list(output.outputs[0].token_ids) == before[0]
            return tuple(count(llm, n) - b for n, b in zip(names, already, strict=True))

        assert run() == (640, 0, 0)
        assert run() == (640, 0, 608)
        assert run(prompt_logprobs=1) == (0, 640, 0)
        assert run(skip_reading_prefix_cache=True) == (0, 640, 0)
        opted_out = {"kv_transfer_params": {"kvtc_load": False}}
        assert run(extra_args=opted_out) == (0, 640, 0)
        # Who may load but must not store is looked up.
        assert run(extra_args={"kv_transfer_params": {"kvtc_store": False}}) == (640, 0, 608)


def with_role(role: str, directory: Path) -> dict[str, Any]:
    """Engine options for one of vLLM's roles."""
    from vllm.config import KVTransferConfig

    fast = {"load_gate": False, "encode_share": 1}
    transfer = {**kv_transfer_config(raw(directory, **fast)), "kv_role": role}
    return {"kv_transfer_config": KVTransferConfig(**transfer)}


def test_a_producer_never_loads_and_a_consumer_never_stores(
    reference_model: Path, prompts: Tokens, before: Tokens, tmp_path: Path
) -> None:
    with engine(reference_model, None, **with_role("kv_producer", tmp_path)) as llm:
        for _ in range(2):
            assert greedy(llm, prompts[:2], ANSWER) == before[:2]
            llm.reset_prefix_cache()
        assert count(llm, "stored_chunks") == 2 * 5
        assert count(llm, "hit_tokens") == count(llm, "loaded_tokens") == 0
    stored = chunk_files(tmp_path)
    assert [len(names) for names in stored.values()] == [10]
    with engine(reference_model, None, **with_role("kv_consumer", tmp_path)) as llm:
        assert greedy(llm, prompts[:3], ANSWER) == before[:3]
        assert count(llm, "loaded_tokens") == 2 * 608
        assert count(llm, "stored_chunks") == 0
    assert chunk_files(tmp_path) == stored
