"""The child process that runs lm-evaluation-harness tasks, with one method or with several.

python -m kvtc_vllm.evaluation.processes.harness JOB.json
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from kvtc_vllm.evaluation.methods import Method
from kvtc_vllm.evaluation.processes.carrier import alone, carrier
from kvtc_vllm.evaluation.processes.harness_suite import HarnessJob, HarnessOutcome
from kvtc_vllm.evaluation.processes.two_pass_lm import Tally, TwoPassLM
from kvtc_vllm.evaluation.replay.engine import ReplayEngine, replay_engine, scratch
from kvtc_vllm.evaluation.reporting.results import EXACT, Row

OWN_TASKS = Path(__file__).parents[1] / "harness_tasks"
BOOTSTRAP = 1000
"""Resamples for the standard error of metrics that aren't means."""


def measure(
    engine: ReplayEngine, manager: TaskManager, job: HarnessJob, directory: Path
) -> HarnessOutcome:
    """Run a job's tasks on an engine in this process. Raises ReplayError.

    manager: knows the tasks. directory: for score files. Prints a warning for each task of
    which nothing is reloaded.
    """
    # lm-eval would otherwise fork this process, engine and all, to resample.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    names = [method.name for method in job.methods]
    model = TwoPassLM(engine, directory, names)

    def evaluate() -> dict[str, Any]:
        results = simple_evaluate(
            model=model,
            tasks=list(manager.match_tasks(job.tasks)),
            task_manager=manager,
            num_fewshot=job.few_shot,
            limit=job.limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
        )
        assert results is not None
        return dict(results)

    # Whatever the method, the same tokens are reloaded.
    tallies = model.tallies[names[0]]
    exactly = evaluate()
    exact = list(_rows(exactly, tallies, None))
    replayed: list[Row] = []
    for method in job.methods:
        model.mode = method.name
        replayed += _rows(evaluate(), model.tallies[method.name], method, exactly)
    warnings = [_too_short(engine, *item) for item in tallies.items()]
    warnings = [text for text in warnings if text]
    for text in warnings:
        print(f"WARNING: {text}", file=sys.stderr, flush=True)
    return HarnessOutcome(exact=exact, replay=replayed, warnings=warnings)


def _too_short(engine: ReplayEngine, task: str, tally: Tally) -> str:
    if tally.reloaded_tokens:
        return ""
    return (
        f"{task}: nothing was reloaded, so its figures say nothing about the method; its longest "
        f"prompt has {tally.longest} tokens, and a reload needs {engine.shortest_reloadable()} "
        "(more few-shot examples make prompts longer)"
    )


def _rows(
    results: dict[str, Any],
    tallies: dict[str, Tally],
    method: Method | None,
    exact: dict[str, Any] | None = None,
) -> Iterator[Row]:
    """Rows of every task and group. method: that of the replays, None for the exact runs.

    exact: what the exact runs gave; tasks then have what a method changes as well.
    """
    for name, figures in results["results"].items():
        leaves = _leaves(name, results["group_subtasks"])
        tally = sum((tallies[leaf] for leaf in leaves), Tally())
        common: dict[str, Any] = {
            "task": f"lm-eval/{name}",
            "method": EXACT if method is None else method.name,
            "plan": "recomputed" if method is None else method.plan,
            "real_ratio": 1.0 if method is None else tally.ratio(),
            "context": tally.longest,
            "label": "",
        }
        metrics = [key for key, value in figures.items() if _is_metric(key, value)]
        for key in metrics:
            metric, _, answer_filter = key.partition(",")
            value = float(figures[key])
            error = figures.get(f"{metric}_stderr,{answer_filter}")
            margin = 1.96 * float(error) if isinstance(error, float) else float("inf")
            yield Row(
                **common,
                metric=metric if answer_filter == "none" else key,
                value=value,
                ci95=(value - margin, value + margin),
                n=figures["sample_len"],
            )
        if exact is not None and name in results["samples"]:
            for metric, change in changes(exact["samples"][name], results["samples"][name]).items():
                value, margin = change.mean(), float("inf")
                if len(change) > 1:
                    margin = 1.96 * change.std(ddof=1) / len(change) ** 0.5
                yield Row(
                    **common,
                    metric=metric,
                    value=float(value),
                    ci95=(float(value - margin), float(value + margin)),
                    n=len(change),
                )
        if metrics and method is not None:
            share = tally.reloaded_tokens / tally.prompt_tokens
            yield Row(
                **common, metric="reloaded_share", value=share, ci95=(share, share), n=tally.prompts
            )


def changes(
    exact: Sequence[dict[str, Any]], replayed: Sequence[dict[str, Any]]
) -> dict[str, np.ndarray]:
    """Of each metric that every document has a number of, replayed minus exact: float64
    [documents], by the name of the metric with `_change`.

    exact, replayed: lm-eval's samples of one task, which has the same documents in both.
    """
    before = {(sample["doc_id"], sample["filter"]): sample for sample in exact}
    found: dict[str, list[float]] = {}
    for sample in replayed:
        own = before[sample["doc_id"], sample["filter"]]
        plain = sample["filter"] == "none"
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                name = f"{metric}_change" if plain else f"{metric}_change,{sample['filter']}"
                found.setdefault(name, []).append(float(sample[metric]) - float(own[metric]))
    return {name: np.array(values) for name, values in found.items()}


def _is_metric(key: str, value: object) -> bool:
    """Whether this is an entry "metric,filter": number of lm-eval's figures of a task."""
    metric, comma, _ = key.partition(",")
    return bool(comma) and not metric.endswith("_stderr") and not isinstance(value, str)


def _leaves(name: str, children: dict[str, list[str]]) -> list[str]:
    """Tasks of a group, or the task itself."""
    if name not in children:
        return [name]
    return [leaf for child in children[name] for leaf in _leaves(child, children)]


def task_manager(job: HarnessJob) -> TaskManager:
    """What finds lm-eval's tasks, those in the job's directory and, with documents, our own."""
    paths = [] if job.task_path is None else [job.task_path]
    if job.source is None:
        return TaskManager(include_path=paths)
    metadata: dict[str, Any] = {"data": job.source.directory, "part": job.source.part}
    return TaskManager(include_path=[*paths, str(OWN_TASKS)], metadata=metadata)


def _single(methods: Sequence[Method], model: str, directory: Path) -> Method:
    (method,) = methods
    return alone(method, model, directory)


def main() -> None:
    """Read the job, run it, write the outcome."""
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=HarnessJob)
    manager = task_manager(job)
    unknown = [name for name in job.tasks if not manager.match_tasks([name])]
    if unknown:
        sys.exit(f"lm-eval knows no task {', '.join(unknown)}")
    with scratch() as directory:
        make = carrier if len(job.methods) > 1 else _single
        method = make(job.methods, job.model, directory)
        with replay_engine(job.model, method, method.chunk_tokens, job.engine) as engine:
            outcome = measure(engine, manager, job, directory)
    Path(job.out).write_bytes(msgspec.msgpack.encode(outcome))


if __name__ == "__main__":
    main()
