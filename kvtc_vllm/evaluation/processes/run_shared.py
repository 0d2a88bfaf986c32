"""Body of one child process: all tasks with several methods over one exact pass per task.

python -m kvtc_vllm.evaluation.processes.run_shared JOB.json
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvtc_vllm.evaluation.job import Outcome, Record, SharedJob, StoredBytes, Workload
from kvtc_vllm.evaluation.meter import Meter
from kvtc_vllm.evaluation.methods import Method
from kvtc_vllm.evaluation.processes.carrier import SHARED, carrier
from kvtc_vllm.evaluation.processes.outcomes import Found, outcomes_so_far, write_outcomes
from kvtc_vllm.evaluation.processes.run_method import (
    Work,
    by_chunk,
    document_names,
    make_sessions,
)
from kvtc_vllm.evaluation.replay.engine import ReplayEngine, replay_engine, scratch
from kvtc_vllm.evaluation.replay.round_trips import TURN
from kvtc_vllm.evaluation.replay.two_passes import batches, exact_pass, replay_pass
from kvtc_vllm.evaluation.tasks import Session


def run(job: SharedJob, tokenizer: Any) -> Iterator[list[Outcome]]:
    """Run the workloads of a job in this process; after each, an outcome per method so far.

    Raises ReplayError.
    """
    work, skipped = make_sessions(job, tokenizer)
    documents = document_names(work)
    prompts = sum(len(session.turns) for _, sessions in work for session in sessions)
    with (
        tqdm(
            total=(1 + len(job.methods)) * prompts, desc=SHARED, unit="prompt", mininterval=2.0
        ) as bar,
        scratch() as directory,
    ):
        method = carrier(job.methods, job.model, directory)
        found = _run(job, method, work, directory, bar)
        yield from outcomes_so_far(job, found, skipped=skipped, documents=documents)


def _run(job: SharedJob, method: Method, work: Work, directory: Path, bar: Any) -> Iterator[Found]:
    """Every workload in turn, in engines with chunks as large as the methods need.

    method: the carrier of all.
    """
    names = [method.name for method in job.methods]
    for chunk_tokens, part in by_chunk(method, job.engine, work):
        with replay_engine(job.model, method, chunk_tokens, job.engine) as engine:
            for workload, sessions in part:
                yield _replay_all(engine, workload, sessions, names, directory, bar)


def _replay_all(
    engine: ReplayEngine,
    workload: Workload,
    sessions: list[Session],
    names: list[str],
    directory: Path,
    bar: Any,
) -> Found:
    task, context = workload.task, workload.context
    records: dict[str, list[Record]] = {name: [] for name in names}
    sizes = dict.fromkeys(names, (0, 0))
    meter = Meter()
    for batch in batches(sessions):
        TURN.begin(None)
        with contextlib.ExitStack() as stack:
            with meter.on():
                exact = stack.enter_context(
                    exact_pass(engine, task, context, batch, directory, bar.update)
                )
            for name in names:
                TURN.begin(name)
                with meter.on(name):
                    records[name] += replay_pass(
                        engine, task, context, batch, directory, exact, bar.update, name
                    )
                raw, stored = TURN.bytes()
                sizes[name] = sizes[name][0] + raw, sizes[name][1] + stored
    return {
        name: (
            records[name],
            StoredBytes(
                task=task,
                context=context,
                raw=sizes[name][0],
                stored=sizes[name][1],
                seconds=meter.spent(name),
                exact_seconds=meter.spent(),
            ),
        )
        for name in names
    }


if __name__ == "__main__":
    write_outcomes(run)
