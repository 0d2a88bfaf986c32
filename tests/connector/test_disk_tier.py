"""The disk tier in a live engine: restart, promotion, identity, loss of the directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import engine, greedy, metrics, texts

pytestmark = pytest.mark.vllm

TOKENS = 640


def extra(directory: Path, **changes: Any) -> dict[str, Any]:
    return {
        "codec": "kvtc",
        "ratio": 8,
        "memory_bytes": "64MiB",
        "disk_path": str(directory),
        "disk_min_free": 0,
        "load_gate": False,
        "load_deadline": 60,
        **changes,
    }


@pytest.fixture(scope="module")
def prompts(reference_model: Path) -> list[list[int]]:
    return texts(reference_model, count=4, tokens=TOKENS)


def reloaded(model: Path, directory: Path, prompts: list[list[int]], **changes: Any):
    """Answers of a fresh engine on this directory, and its metrics."""
    with engine(model, extra(directory, **changes)) as llm:
        answers = greedy(llm, prompts, 12)
        return answers, metrics(llm)


def test_a_restarted_engine_resumes_from_disk(
    reference_model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    with engine(reference_model, extra(tmp_path)) as llm:
        greedy(llm, prompts, 12)
        llm.reset_prefix_cache()
        expected = greedy(llm, prompts, 12)
        assert metrics(llm)["kvtc_promoted_chunks"] == 0
    answers, found = reloaded(reference_model, tmp_path, prompts)
    assert answers == expected
    assert found["kvtc_loaded_tokens"] == found["kvtc_hit_tokens"] == 4 * 512
    assert found["kvtc_promoted_chunks"] == 4 * 4
    assert found["kvtc_disk_chunks"] == 4 * 5
    assert found["kvtc_disk_used_bytes"] > 0

    # Another plan of the same artifact reads the same chunks; another dtype does not.
    _, other_ratio = reloaded(reference_model, tmp_path, prompts, ratio=16)
    assert other_ratio["kvtc_loaded_tokens"] == 4 * 512
    _, raw = reloaded(reference_model, tmp_path, prompts, codec="raw", ratio=None)
    assert raw["kvtc_loaded_tokens"] == 0


def test_memory_overflows_to_disk_and_back(
    reference_model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Memory holds about two prompts; write-behind keeps the others on disk."""
    small = extra(tmp_path, memory_bytes="800kB", disk_write="behind")
    with engine(reference_model, small) as llm:
        first = [greedy(llm, [prompt], 12)[0] for prompt in prompts]
        llm.reset_prefix_cache()
        again = [greedy(llm, [prompt], 12)[0] for prompt in prompts]
        found = metrics(llm)
    assert found["kvtc_evicted_chunks"] > 0
    assert found["kvtc_promoted_chunks"] > 0
    assert found["kvtc_loaded_tokens"] == 4 * 512
    same = sum(a == b for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert same >= 0.9 * 4 * 12


def test_a_vanished_or_damaged_directory_costs_only_time(
    reference_model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    directory = tmp_path / "tier"
    with engine(reference_model, extra(directory)) as llm:
        expected = greedy(llm, prompts[:2], 12)
    for path in directory.rglob("*.kvtc"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with engine(reference_model, extra(directory)) as llm:
        assert greedy(llm, prompts[:1], 12) == expected[:1]
        while directory.exists():  # the tier's writer may put a file into what is being removed
            shutil.rmtree(directory, ignore_errors=True)
        assert greedy(llm, prompts[1:2], 12) == expected[1:2]
        found = metrics(llm)
    assert found["kvtc_loaded_tokens"] == 0
    assert found["kvtc_disk_errors/corrupt"] >= 1
    assert found["kvtc_disk_errors/missing"] >= 1


def test_requests_may_opt_out_and_salts_share_nothing(
    reference_model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    from vllm import SamplingParams

    with engine(reference_model, extra(tmp_path)) as llm:

        def run(salt: str | None = None, **params: bool) -> dict[str, float]:
            llm.reset_prefix_cache()
            before = metrics(llm)
            prompt: dict[str, Any] = {"prompt_token_ids": prompts[0]}
            if salt is not None:
                prompt["cache_salt"] = salt
            llm.generate(
                [prompt],
                SamplingParams(
                    temperature=0, max_tokens=4, extra_args={"kv_transfer_params": params}
                ),
                use_tqdm=False,
            )
            greedy(llm, [prompts[3][:40]], 1)  # lets stores finish
            after = metrics(llm)
            return {name: after[name] - before.get(name, 0) for name in after}

        assert run(kvtc_store=False)["kvtc_stored_chunks"] == 0
        assert run(salt="a")["kvtc_stored_chunks"] == 5
        assert run(salt="b")["kvtc_loaded_tokens"] == 0
        assert run(salt="a")["kvtc_loaded_tokens"] == 512
        assert run(salt="a", kvtc_load=False)["kvtc_loaded_tokens"] == 0
