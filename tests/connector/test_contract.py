"""The connector inside a real vLLM, on the CPU build. Also run on an older vLLM.

float32 makes tokens a sharp test: vLLM itself gives other bits in bf16 when a
prefix is computed in other pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import engine, greedy, metrics, texts, worker_arena

pytestmark = pytest.mark.vllm

SMALL = {"num_gpu_blocks_override": 72, "max_num_batched_tokens": 512, "max_num_seqs": 4}
"""Fewer blocks than four requests need: eviction, chunked prefill and preemption at once."""


@pytest.fixture(scope="module")
def prompts(reference_model: Path) -> list[list[int]]:
    return texts(reference_model, count=8, tokens=700)


@pytest.fixture(scope="module")
def expected(reference_model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What an engine without any connector says."""
    with engine(reference_model, None) as llm:
        return greedy(llm, prompts, 96)


def agree(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Fraction of positions with the same token."""
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def check_counters(values: dict[str, float], budget: int) -> None:
    """vLLM's counters, ours, and the budget."""
    assert values["external_prefix_cache_hits"] == values["kvtc_hit_tokens"]
    offered = values["kvtc_hit_tokens"] + values.get("kvtc_resumed_hit_tokens", 0)
    assert values["kvtc_loaded_tokens"] == offered
    assert values["kvtc_tier_used_bytes"] <= values["kvtc_tier_capacity_bytes"] == budget


def test_raw_reload_is_exact_through_eviction_and_preemption(
    reference_model: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    extra = {"preset": "raw", "memory_bytes": 256 << 20}
    with engine(reference_model, extra, **SMALL) as llm:
        assert greedy(llm, prompts, 96) == expected
        stored = metrics(llm)
        assert stored["kvtc_stored_chunks"] >= 8 * 5
        assert greedy(llm, prompts, 96) == expected
        values = metrics(llm)
        assert values["num_preemptions"] > 0
        check_counters(values, 256 << 20)
        assert values["kvtc_loaded_tokens"] >= 0.6 * 8 * 700
        assert worker_arena().used == values["kvtc_tier_used_bytes"]


def test_raw_reload_equals_a_prefix_hit_and_reset_forgets(
    reference_model: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with engine(reference_model, {"preset": "raw", "memory_bytes": 256 << 20}) as llm:
        assert greedy(llm, prompts[:3], 96) == expected[:3]
        before = metrics(llm)
        assert greedy(llm, prompts[:3], 96) == expected[:3]
        hit = metrics(llm)
        assert hit["prefix_cache_hits"] > before["prefix_cache_hits"]
        assert hit["kvtc_hit_tokens"] == before.get("kvtc_hit_tokens", 0)
        assert llm.reset_prefix_cache()
        assert greedy(llm, prompts[:3], 96) == expected[:3]
        reloaded = metrics(llm)
        assert reloaded["kvtc_hit_tokens"] == 3 * 640
        check_counters(reloaded, 256 << 20)
        # Dropping our tier as well leaves nothing to load.
        assert llm.reset_prefix_cache(reset_connector=True)
        assert greedy(llm, prompts[:3], 96) == expected[:3]
        assert metrics(llm)["kvtc_hit_tokens"] == reloaded["kvtc_hit_tokens"]
        assert worker_arena().used == metrics(llm)["kvtc_tier_used_bytes"]


def test_generated_blocks_are_reloaded_in_the_next_turn(
    reference_model: Path, prompts: list[list[int]]
) -> None:
    with engine(reference_model, {"preset": "raw", "memory_bytes": 256 << 20}) as llm:
        (answer,) = greedy(llm, prompts[:1], 200)
        follow_up = prompts[0] + answer + prompts[1][:60]
        (cold,) = greedy(llm, [follow_up], 16)
        before = metrics(llm).get("kvtc_hit_tokens", 0)
        assert llm.reset_prefix_cache()
        (warm,) = greedy(llm, [follow_up], 16)
        assert warm == cold
        assert metrics(llm)["kvtc_hit_tokens"] - before == 896


def test_kvtc_4x_agrees_with_the_uncompressed_run(
    reference_model: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Greedy tokens after a reload, at each position given the uncompressed run's past."""
    positions = 24
    with engine(reference_model, {"codec": "kvtc", "ratio": 4, "memory_bytes": "64MiB"}) as llm:
        greedy(llm, prompts, 1)
        assert llm.reset_prefix_cache()
        queries = [
            prompt + past[:i]
            for prompt, past in zip(prompts, expected, strict=True)
            for i in range(positions)
        ]
        answers = greedy(llm, queries, 1)
        wanted = [[past[i]] for past in expected for i in range(positions)]
        values = metrics(llm)
        check_counters(values, 64 << 20)
        assert values["kvtc_hit_tokens"] >= len(prompts) * 512
        assert agree(answers, wanted) >= 0.95


@pytest.fixture
def full_tier(
    reference_model: Path, prompts: list[list[int]]
) -> Iterator[tuple[Any, list[list[int]]]]:
    """An engine with KVTC chunks of three prompts in its tier and an empty GPU cache."""
    # With one thread for loads, a request tries nothing after its first batch with a bad chunk.
    extra = {"preset": "kvtc-16x", "memory_bytes": "64MiB", "load_threads": 1}
    with engine(reference_model, extra) as llm:
        answers = greedy(llm, prompts[:3], 48)
        assert llm.reset_prefix_cache()
        yield llm, answers


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_corrupt_blob_is_recomputed(
    full_tier: tuple[Any, list[list[int]]], prompts: list[list[int]], place: str
) -> None:
    llm, computed = full_tier
    arena = worker_arena()
    for key in list(arena.keys()):
        blob = bytearray(arena.read(key))
        at = {"first": 0, "middle": len(blob) // 2, "last": len(blob) - 1}[place]
        blob[at] ^= 0x40
        assert arena.write(key, bytes(blob))
    assert greedy(llm, prompts[:3], 48) == computed
    values = metrics(llm)
    failures = {k: v for k, v in values.items() if k.startswith("kvtc_failed_loads") and v}
    assert set(failures) <= {"kvtc_failed_loads/checksum", "kvtc_failed_loads/magic"}
    from kvtc_vllm.codec.cpu.codec import CpuKvtcCodec  # late: it imports numba

    assert 3 <= sum(failures.values()) <= 3 * CpuKvtcCodec.batch
    assert values.get("kvtc_loaded_tokens", 0) == 0
    # The server lives on, and what was recomputed is stored and reloaded again.
    assert llm.reset_prefix_cache()
    greedy(llm, prompts[:3], 48)
    assert metrics(llm)["kvtc_loaded_tokens"] > 0


def test_a_missing_or_foreign_blob_is_recomputed(
    full_tier: tuple[Any, list[list[int]]], prompts: list[list[int]]
) -> None:
    llm, computed = full_tier
    arena = worker_arena()
    keys = arena.keys()
    # Chunks under other prompts' names: valid blobs, some of the right position.
    blobs = [arena.read(key) for key in keys]
    for key, blob in zip(keys, blobs[5:] + blobs[:5], strict=True):
        assert arena.write(key, blob)
    arena.remove(keys[:1])
    answers = greedy(llm, prompts[:3], 48)
    values = metrics(llm)
    failures = [k for k, v in values.items() if k.startswith("kvtc_failed_loads") and v]
    reasons = {name.split("/")[1] for name in failures}
    assert reasons == {"missing", "fingerprint"}
    assert values.get("kvtc_loaded_tokens", 0) == 0
    assert answers == computed


def test_a_small_budget_is_never_exceeded(
    reference_model: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    tight = {**SMALL, "num_gpu_blocks_override": 68}
    wanted = [answer[:32] for answer in expected]
    for eviction in ("lru", "arc"):
        budget = 3 << 20
        extra = {"preset": "raw", "memory_bytes": budget, "eviction": eviction}
        with engine(reference_model, extra, **tight) as llm:
            assert greedy(llm, prompts, 32) == wanted
            assert greedy(llm, prompts, 32) == wanted
            values = metrics(llm)
            assert values["num_preemptions"] > 0
            assert values["kvtc_evicted_chunks"] > 0
            assert worker_arena().used <= budget
            assert worker_arena().used == values["kvtc_tier_used_bytes"]


def test_real_ratio_with_every_byte_counted(
    reference_model: Path, prompts: list[list[int]]
) -> None:
    """bf16 cache, so that the ratio is against what vLLM would really hold."""
    for ratio, floor in ((8, 7.0), (16, 14.0), (32, 26.0)):
        extra = {"codec": "kvtc", "ratio": ratio, "memory_bytes": "64MiB"}
        with engine(reference_model, extra, dtype="bfloat16") as llm:
            # One prompt: a CPU without AVX-512 is many times slower in bfloat16.
            greedy(llm, [prompts[0] + prompts[1]], 1)
            values = metrics(llm)
            assert values["kvtc_stored_chunks"] == 10
            assert values["kvtc_stored_raw_bytes"] / values["kvtc_stored_bytes"] >= floor
