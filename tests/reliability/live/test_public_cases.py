"""What vLLM lets a user combine: every answer is the one that vLLM gives alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.connector.engine import drain, engine, greedy, metrics
from tests.reliability.live.conftest import ANSWER, Tokens
from tests.reliability.live.models import WEIGHTS
from tests.reliability.live.replica import MARK
from tests.reliability.live.stepping import count, raw, settings

pytestmark = pytest.mark.vllm

EMBEDDED = {"enable_prompt_embeds": True}


def test_preemption_asynchronous_scheduling_and_priorities_with_a_disk(
    reference_model: Path, prompts: Tokens, tmp_path: Path
) -> None:
    """Too few blocks for four requests, too little memory for their chunks."""
    tokens = 64
    tight = {
        "max_model_len": 1024,
        "num_gpu_blocks_override": 64,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 4,
        "scheduling_policy": "priority",
        "async_scheduling": True,
    }
    with engine(reference_model, None) as llm:
        expected = greedy(llm, prompts, tokens)
    extra = raw(tmp_path, memory_bytes=12 << 20, disk_write="behind")
    with engine(reference_model, extra, **tight) as llm:
        for order in (range(6), range(6, 0, -1)):
            outputs = llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                settings(tokens),
                use_tqdm=False,
                priority=list(order),
            )
            assert [list(output.outputs[0].token_ids) for output in outputs] == expected
            drain(llm)
        assert metrics(llm)["num_preemptions"] > 0
        assert count(llm, "evicted_chunks") > 0
        assert count(llm, "promoted_chunks") > 0
        assert count(llm, "loaded_tokens") > 0


def test_swapped_and_truncated_files_are_misses(
    reference_model: Path, prompts: Tokens, before: Tokens, tmp_path: Path
) -> None:
    with engine(reference_model, raw(tmp_path)) as llm:
        assert greedy(llm, prompts[:4], ANSWER) == before[:4]
    paths = sorted(tmp_path.rglob("*.kvtc"))
    assert len(paths) == 20
    contents = [path.read_bytes() for path in paths]
    for number, path in enumerate(paths):
        if number < 10:
            path.write_bytes(contents[9 - number])
        else:
            path.write_bytes(contents[number][: len(contents[number]) * (number - 10) // 10])
    with engine(reference_model, raw(tmp_path)) as llm:
        assert greedy(llm, prompts[:4], ANSWER) == before[:4]
        assert count(llm, "loaded_tokens") == 0
        assert count(llm, "disk_errors") >= 4
        # What was computed instead is stored and found again.
        llm.reset_prefix_cache()
        assert greedy(llm, prompts[:4], ANSWER) == before[:4]
        assert count(llm, "loaded_tokens") == 4 * 608


def test_pooling(reference_model: Path, prompts: Tokens, tmp_path: Path) -> None:
    options = {"runner": "pooling", "convert": "embed", "enable_prefix_caching": True}

    def embed(llm: Any) -> torch.Tensor:
        asked = [{"prompt_token_ids": ids} for ids in prompts[:2]]
        found = [output.outputs.embedding for output in llm.embed(asked, use_tqdm=False)]
        drain(llm)
        return torch.tensor(found)

    with engine(reference_model, None, **options) as llm:
        expected = embed(llm)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    with engine(reference_model, raw(tmp_path), **options) as llm:
        torch.testing.assert_close(embed(llm), expected, atol=1e-5, rtol=1e-5)
    with engine(reference_model, raw(tmp_path), **options) as llm:
        torch.testing.assert_close(embed(llm), expected, atol=1e-5, rtol=1e-5)
        assert count(llm, "loaded_tokens") == 2 * 608


def test_prompts_of_embeddings(reference_model: Path, prompts: Tokens, before: Tokens) -> None:
    """They have no token ids: vLLM hashes what they are."""
    table = load_file(reference_model / WEIGHTS)["model.embed_tokens.weight"].float()
    asked = [{"prompt_embeds": table[torch.tensor(ids)]} for ids in prompts[:2]]

    def ask(llm: Any) -> Tokens:
        outputs = llm.generate(asked, settings(ANSWER), use_tqdm=False)
        drain(llm)
        return [list(output.outputs[0].token_ids) for output in outputs]

    with engine(reference_model, raw(), **EMBEDDED) as llm:
        assert ask(llm) == before[:2]
        assert count(llm, "loaded_tokens") == 0
        llm.reset_prefix_cache()
        assert ask(llm) == before[:2]
        assert count(llm, "loaded_tokens") == 2 * 608


@pytest.mark.long
def test_streaming_sessions(reference_model: Path) -> None:
    """A request whose prompt grows while it is answered, as a server takes it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.live.streaming", str(reference_model)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=1100,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert len(lines) == 2, done.stderr[-3000:]
    plain, tiered = (json.loads(line.removeprefix(MARK)) for line in lines)
    assert plain["loaded"] == 0
    assert tiered["loaded"] >= 608  # the first turn's prompt, in the second session
    assert tiered["answers"] == plain["answers"]
