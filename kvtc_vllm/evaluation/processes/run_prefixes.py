"""Body of one child process: all tasks with methods that drop or recall tokens.

python -m kvtc_vllm.evaluation.processes.run_prefixes JOB.json
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.evaluation.eviction import EVICTIONS
from kvtc_vllm.evaluation.job import (
    Outcome,
    Record,
    SharedJob,
    StoredBytes,
    Workload,
    make_record,
)
from kvtc_vllm.evaluation.meter import Meter
from kvtc_vllm.evaluation.methods import Method
from kvtc_vllm.evaluation.prefixes.base import PrefixMethod
from kvtc_vllm.evaluation.prefixes.coded import Coded
from kvtc_vllm.evaluation.prefixes.evicted import Evicted
from kvtc_vllm.evaluation.prefixes.recalled import Recalled
from kvtc_vllm.evaluation.prefixes.runner import PrefixRunner
from kvtc_vllm.evaluation.processes.carrier import artifact_of
from kvtc_vllm.evaluation.processes.outcomes import Found, outcomes_so_far, write_outcomes
from kvtc_vllm.evaluation.processes.run_method import document_names, make_sessions
from kvtc_vllm.evaluation.recall import RECALLS
from kvtc_vllm.evaluation.tasks import Session


def run(job: SharedJob, tokenizer: Any) -> Iterator[list[Outcome]]:
    """Run the workloads of a job in this process; after each, an outcome per method so far."""
    work, skipped = make_sessions(job, tokenizer)
    documents = document_names(work)
    window, chunk_tokens = job.methods[0].window, job.methods[0].chunk_tokens
    runner = PrefixRunner(job.model, {m.name: open_method(m, job.model) for m in job.methods})
    prompts = sum(len(session.turns) for _, sessions in work for session in sessions)
    with tqdm(total=prompts, desc="prefixes", unit="prompt", mininterval=2.0) as bar:
        found = (
            _run(runner, workload, sessions, window, chunk_tokens, bar)
            for workload, sessions in work
        )
        yield from outcomes_so_far(job, found, skipped=skipped, documents=documents)


def open_method(method: Method, model: str) -> PrefixMethod:
    """What is done to a stored prefix. method: one with `tokens`. Raises ArtifactError."""
    assert method.tokens is not None
    if method.tokens in RECALLS:
        return Recalled(RECALLS[method.tokens](**method.settings))
    eviction = EVICTIONS[method.tokens](**method.settings)
    if method.ratio is None:
        return Evicted(eviction)
    artifact = load_rank_artifact(artifact_of(method, model), 0)[0]
    codec = open_codec(artifact.codec, torch.bfloat16, artifact=artifact, ratio=method.ratio)
    ropes = [None if index is None else artifact.ropes[index] for index in artifact.layer_rope]
    return Coded(eviction, codec, ropes, method.chunk_tokens)


def _run(
    runner: PrefixRunner,
    workload: Workload,
    sessions: list[Session],
    window: int,
    chunk_tokens: int,
    bar: Any,
) -> Found:
    task, context = workload.task, workload.context
    records: dict[str, list[Record]] = {}
    sizes: dict[str, tuple[int, int, int]] = {}
    meter = Meter()
    runner.meter = meter
    for number, session in enumerate(sessions):
        for name, turns in runner.score_session(session, window, chunk_tokens).items():
            records.setdefault(name, []).extend(
                make_record(
                    task,
                    context,
                    number,
                    turn.example,
                    turn.prefix_tokens,
                    turn.exact,
                    turn.reduced,
                )
                for turn in turns
            )
            last = turns[-1]
            full, kept, read = sizes.get(name, (0, 0, 0))
            sizes[name] = (
                full + last.bytes_full,
                kept + last.bytes_stored,
                read + last.bytes_read,
            )
        bar.update(len(session.turns))
    return {
        name: (
            records[name],
            StoredBytes(
                task=task,
                context=context,
                raw=full,
                stored=kept,
                read=read if read != kept else 0,
                seconds=meter.spent(name),
                exact_seconds=meter.spent(),
            ),
        )
        for name, (full, kept, read) in sizes.items()
    }


if __name__ == "__main__":
    write_outcomes(run)
