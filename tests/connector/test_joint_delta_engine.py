"""`joint: delta` in a live engine, where it is the default. By `make test-joint`: it calibrates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.connector.calibrated import calibrate
from tests.connector.conversations import CHUNKS
from tests.connector.engine import drain, engine, metrics, texts, worker_arena
from tests.connector.test_restart import resume_after_kill_9

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(os.environ.get("KVTC_JOINT") != "1", reason="takes a calibration"),
]

TOKENS = 768
OWN = 160
"""Tokens of a prompt before the passage, so that it lies on another grid of chunks."""


@pytest.fixture(scope="module")
def extra(reference_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Configuration with an artifact of codec 2."""
    directory = tmp_path_factory.mktemp("calibration")
    options = {"--ratios": "8", "--halvings": "2", "--name": "made"}
    calibrate(reference_model, directory, 60_000, 1000, options)
    (artifact,) = directory.glob("*/made")
    chosen = {"codec": "kvtc2", "ratio": 8, "artifact": str(artifact), "memory_bytes": "64MiB"}
    return {**chosen, "joint": "off"}


@pytest.fixture(scope="module")
def prompts(reference_model: Path) -> list[list[int]]:
    """One passage after two beginnings."""
    first, second, passage = texts(reference_model, count=3, tokens=TOKENS)
    return [first[: 2 * OWN] + passage[:-OWN], second[:OWN] + passage[:-OWN]]


def logprobs(llm: Any, prompts: list[list[int]]) -> list[dict[int, float]]:
    """Of eight tokens per prompt, the three most likely and what was chosen, prompt by prompt."""
    from vllm import SamplingParams

    found: list[dict[int, float]] = []
    for ids in prompts:  # one by one: batches change sums in their last bits
        params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        drain(llm)
        found += [{t: p.logprob for t, p in one.items()} for one in output.outputs[0].logprobs]
    return found


def reloaded(
    model: Path,
    extra: dict[str, Any],
    prompts: list[list[int]],
    spoil: Any = None,
    **options: Any,
) -> tuple[list[dict[int, float]], list[dict[int, float]], dict[str, float]]:
    """What was computed, what comes after a reload, and the counters."""
    with engine(model, extra, max_model_len=1024, **options) as llm:
        computed = logprobs(llm, prompts)
        llm.reset_prefix_cache()
        if spoil is not None:
            spoil(worker_arena())
        return computed, logprobs(llm, prompts), metrics(llm)


def test_answers_are_those_without_it(
    reference_model: Path, extra: dict[str, Any], prompts: list[list[int]]
) -> None:
    _, off, plain = reloaded(reference_model, extra, prompts)
    default = {key: value for key, value in extra.items() if key != "joint"}
    _, on, counted = reloaded(reference_model, default, prompts)
    assert on == off  # to the bit: the same blobs were decoded
    assert counted["kvtc_loaded_tokens"] == plain["kvtc_loaded_tokens"] > TOKENS
    assert plain.get("kvtc_delta_chunks", 0) == 0
    assert counted["kvtc_delta_chunks"] >= 3
    saved = plain["kvtc_tier_used_bytes"] - counted["kvtc_tier_used_bytes"]
    assert saved == counted["kvtc_delta_bytes"] > 0.1 * plain["kvtc_tier_used_bytes"]


def test_without_representatives_it_recomputes(
    reference_model: Path, extra: dict[str, Any], prompts: list[list[int]]
) -> None:
    """Taken away below the layer, after they were stored."""

    def spoil(store: Any) -> None:
        for name in list(store._sources):
            store._inner.remove([name])

    on = {**extra, "joint": "delta"}
    computed, again, counted = reloaded(reference_model, on, prompts[::-1], spoil)
    assert counted["kvtc_failed_loads/representative"] >= 1
    # The last prompt's passage is kept as differences; what they lack is computed, as at first.
    for before, after in zip(computed[8:], again[8:], strict=True):
        for token in before.keys() & after.keys():
            assert after[token] == pytest.approx(before[token], abs=0.3)


def test_what_is_stored_at_an_eviction_is_told_from_what_was(
    reference_model: Path, extra: dict[str, Any], prompts: list[list[int]]
) -> None:
    """With a cache for one prompt and a half, the first is stored while the second is computed."""
    late, few = {**extra, "store_policy": "on_evict"}, {"num_gpu_blocks_override": 40}
    _, off, plain = reloaded(reference_model, late, prompts, **few)
    _, on, counted = reloaded(reference_model, {**late, "joint": "delta"}, prompts, **few)
    assert on == off
    assert counted["kvtc_loaded_tokens"] == plain["kvtc_loaded_tokens"] > TOKENS / 2
    assert counted["kvtc_delta_chunks"] >= 3
    assert counted.get("kvtc_dropped_stores/overwritten", 0) == 0


@pytest.mark.crash
def test_kill_9_while_differences_are_stored(
    reference_model: Path, extra: dict[str, Any], tmp_path: Path
) -> None:
    """The disk has whole chunks, so what was killed needs none of the others."""
    keys = {name: extra[name] for name in ("codec", "ratio", "artifact")}
    found = resume_after_kill_9(reference_model, tmp_path, **keys, joint="delta")
    assert found["uninterrupted"]["kvtc_stored_chunks"] == CHUNKS
    # The new prompts, in which the kill came, differ from the first in one token each.
    assert found["resumed"].get("kvtc_failed_loads/representative", 0) == 0
