"""Body of one child process: all tasks with one method, results to a file.

    python -m kvtc_vllm.evaluation.processes.run_method JOB.json

A process of its own, because vLLM keeps process-wide state, and so that a method
that fails takes nothing else with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from kvtc_vllm.evaluation.job import (
    Job,
    Outcome,
    Record,
    SharedJob,
    StoredBytes,
    Workload,
)
from kvtc_vllm.evaluation.methods import Method
from kvtc_vllm.evaluation.processes.carrier import alone
from kvtc_vllm.evaluation.replay.engine import replay_engine, scratch
from kvtc_vllm.evaluation.replay.two_passes import replay
from kvtc_vllm.evaluation.tasks import DataError, Session, open_task

Work = list[tuple[Workload, list[Session]]]


def run(job: Job, tokenizer: Any) -> Outcome:
    """Run all workloads of a job in this process. Raises ReplayError."""
    work, skipped = make_sessions(job, tokenizer)
    records: list[Record] = []
    stored: list[StoredBytes] = []
    prompts = sum(len(session.turns) for _, sessions in work for session in sessions)
    with tqdm(total=2 * prompts, desc=job.method.name, unit="prompt", mininterval=2.0) as bar:
        for part, size in _run_tier(job, work, bar):
            records += part
            stored.append(size)
    return Outcome(
        method=job.method,
        records=records,
        stored=stored,
        skipped=skipped,
        documents=document_names(work),
    )


def document_names(work: Work) -> list[str]:
    """Names of the public documents in all sessions."""
    return sorted({name for _, own in work for session in own for name in session.documents})


def make_sessions(job: Job | SharedJob, tokenizer: Any) -> tuple[Work, list[str]]:
    """The sessions of every workload, and why some have none. Raises DataError."""
    work: Work = []
    skipped = []
    for workload in job.workloads:
        try:
            sessions = open_task(workload.task, job.source).sessions(
                tokenizer, workload.context, workload.count, job.seed
            )
        except DataError:
            raise
        except ValueError as error:
            skipped.append(f"{workload.task} at {workload.context}: {error}")
            continue
        work.append((workload, sessions))
    return work, skipped


def _run_tier(job: Job, work: Work, bar: Any) -> Iterator[tuple[list[Record], StoredBytes]]:
    with scratch() as directory:
        method = alone(job.method, job.model, directory)
        for chunk_tokens, part in by_chunk(job.method, job.engine, work):
            with replay_engine(job.model, method, chunk_tokens, job.engine) as engine:
                for workload, sessions in part:
                    yield replay(
                        engine, workload.task, workload.context, sessions, directory, bar.update
                    )


def by_chunk(method: Method, engine: dict[str, Any], work: Work) -> Iterator[tuple[int, Work]]:
    """Work that can share an engine, with its chunk size.

    A method that needs a whole prefix gets a chunk as large as the shortest first
    prompt allows, for each task and context of its own.
    """
    if not method.whole_prompt:
        yield method.chunk_tokens, work
        return
    block = int(engine.get("block_size", 16))
    for workload, sessions in work:
        shortest = min(len(session.turns[0].prompt) for session in sessions)
        chunk = shortest - method.window
        yield chunk - chunk % block, [(workload, sessions)]


def main() -> None:
    """Read the job, run it, write the outcome."""
    from transformers import AutoTokenizer

    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Job)
    outcome = run(job, AutoTokenizer.from_pretrained(job.model))
    Path(job.out).write_bytes(msgspec.msgpack.encode(outcome))


if __name__ == "__main__":
    main()
