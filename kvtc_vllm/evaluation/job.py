"""What a measuring process is given and what it gives back."""

from __future__ import annotations

from typing import Any

import msgspec

from kvtc_vllm.evaluation.methods import Method
from kvtc_vllm.evaluation.scores import Scores
from kvtc_vllm.evaluation.tasks import Example, Source


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """`count` sessions of one task at one context (tokens)."""

    task: str
    context: int
    count: int


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What one process does."""

    model: str
    method: Method
    workloads: list[Workload]
    seed: int
    source: Source | None
    """Public documents, for tasks that read them."""
    engine: dict[str, Any]
    """Further `vllm.LLM` arguments."""
    out: str
    """File for the outcome."""


class SharedJob(msgspec.Struct, frozen=True, kw_only=True):
    """What one process does with several methods over one exact pass. Fields as in `Job`."""

    model: str
    methods: list[Method]
    workloads: list[Workload]
    seed: int
    source: Source | None
    engine: dict[str, Any]
    out: str


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One example: exact run and replay. Losses are nats, summed over the target."""

    task: str
    context: int
    session: int
    label: str
    is_answer: bool
    prompt_tokens: int
    reloaded_tokens: int
    target_tokens: int
    nll_exact: float
    nll: float
    kl: float
    agreed: int
    """Target positions at which both runs have the same most likely token."""
    correct_exact: bool
    correct: bool


class StoredBytes(msgspec.Struct, frozen=True, kw_only=True):
    """What one task stored. raw: the same KV in the cache's dtype.

    read: what one query reads of it, on average over the queries of each prompt; 0: all.
    seconds, exact_seconds: of processors, that its replays took and the exact runs that it was
    compared with; 0: not measured.
    """

    task: str
    context: int
    raw: int
    stored: int
    read: int = 0
    seconds: float = 0.0
    exact_seconds: float = 0.0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What it found. skipped: tasks that don't fit their context, with the reason."""

    method: Method
    records: list[Record]
    stored: list[StoredBytes]
    skipped: list[str]
    documents: list[str]
    """Names of the public documents in the prompts."""


def make_record(
    task: str,
    context: int,
    session: int,
    example: Example,
    reloaded: int,
    exact: Scores,
    score: Scores,
) -> Record:
    """Put the scores of both runs of one example side by side."""
    assert score.kl is not None
    target = example.target
    return Record(
        task=task,
        context=context,
        session=session,
        label=example.label,
        is_answer=example.is_answer,
        prompt_tokens=len(example.prompt),
        reloaded_tokens=reloaded,
        target_tokens=len(target),
        nll_exact=float(exact.nll.sum()),
        nll=float(score.nll.sum()),
        kl=float(score.kl.sum()),
        agreed=int((exact.top == score.top).sum()),
        correct_exact=exact.top.tolist() == target,
        correct=score.top.tolist() == target,
    )
