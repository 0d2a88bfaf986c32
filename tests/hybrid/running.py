"""Engines of the tiny models, and what they say."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.connector.engine import drain, engine
from tests.hybrid.families import VOCABULARY

RAW = {"codec": "raw", "memory_bytes": "256MiB"}


class Answer(NamedTuple):
    """tokens: greedy. logprobs: of the most likely five at every position."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


def start(model: Path, extra: dict[str, Any] | None, **options: Any) -> Any:
    """An engine that needs no tokenizer, with blocks for several groups."""
    settings = {
        "skip_tokenizer_init": True,
        "num_gpu_blocks_override": 1024,
        "max_model_len": 1024,
        "max_num_batched_tokens": 512,
        **options,
    }
    return engine(model, extra, **settings)


def prompts(count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(2, VOCABULARY) for _ in range(tokens)] for _ in range(count)]


def ask(llm: Any, texts: list[list[int]], tokens: int = 12, load: bool = True) -> list[Answer]:
    """Greedy answers. load: whether the tier may be used."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in texts],
        SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            logprobs=5,
            detokenize=False,
            extra_args={"kv_transfer_params": {"kvtc_load": load}},
        ),
        use_tqdm=False,
    )
    drain(llm)
    return [
        Answer(
            list(output.outputs[0].token_ids),
            [{token: p.logprob for token, p in of.items()} for of in output.outputs[0].logprobs],
        )
        for output in outputs
    ]


def difference(ours: list[Answer], theirs: list[Answer]) -> float:
    """Largest difference of a logprob; infinite where tokens differ."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.tokens != b.tokens:
            return float("inf")
        for left, right in zip(a.logprobs, b.logprobs, strict=True):
            common = left.keys() & right.keys()
            worst = max(worst, *(abs(left[token] - right[token]) for token in common))
    return worst


@contextlib.contextmanager
def loading_zeros(group: int) -> Iterator[None]:
    """All that is loaded into this cache group is zero: shows that a model notices."""
    from kvtc_vllm.connector.state_transfer import StateTransfer
    from kvtc_vllm.connector.torch_transfer import TorchTransfer

    scatter, fill = TorchTransfer._scatter, StateTransfer._fill

    def zeros(self: Any, item: Any, chunk: Any) -> None:
        if item.group == group:
            chunk = replace(chunk, k=chunk.k * 0, v=chunk.v * 0)
        scatter(self, item, chunk)

    def no_state(self: Any, block_ids: Any, pages: Any) -> None:
        fill(self, block_ids, pages * 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchTransfer, "_scatter", zeros)
        if group:
            patch.setattr(StateTransfer, "_fill", no_state)
        yield


def by_kind(llm: Any, name: str) -> dict[str, float]:
    """A counter of ours that is kept by kind of cache group: kind -> value."""
    return {
        metric.labels["kind"]: metric.value
        for metric in llm.get_metrics()
        if metric.name == f"vllm:kvtc_kind_{name}"
    }


def cache_groups(llm: Any) -> int:
    """Of the connector in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return len(core.scheduler.connector._geometry.groups)


def records(llm: Any, group: int) -> int:
    """Ready or pending records of a cache group in the scheduler's index."""
    index = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler.index
    keys = [*index._ready, *index._pending]
    plain = min(map(len, keys))
    suffix = {bytes((group,))} if group else {b""}
    return sum(key[plain:] in suffix for key in keys)
