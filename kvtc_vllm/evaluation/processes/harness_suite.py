"""lm-evaluation-harness tasks with every method, each in a child process (`harness.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from kvtc_vllm.evaluation.methods import Method
from kvtc_vllm.evaluation.processes.suite import (
    SHARED_PASSES,
    SuiteError,
    describe,
    open_earlier,
    run_child,
)
from kvtc_vllm.evaluation.reporting import report
from kvtc_vllm.evaluation.reporting.results import Row
from kvtc_vllm.evaluation.reporting.seconds import Stopwatch
from kvtc_vllm.evaluation.tasks import Source


class HarnessJob(msgspec.Struct, frozen=True, kw_only=True):
    """What one process does."""

    model: str
    methods: list[Method]
    """With several, all can share exact passes with the first (`Method.can_share`)."""
    tasks: list[str]
    """Names, groups or patterns known to lm-eval."""
    task_path: str | None
    """Directory with further definitions."""
    source: Source | None
    """Public documents, for our own definitions."""
    limit: int | None
    """Documents of each task."""
    few_shot: int | None
    """Examples before each question; None for the task's own number."""
    engine: dict[str, Any]
    """Further `vllm.LLM` arguments."""
    out: str = ""
    """File for the outcome."""


class HarnessOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What it found. warnings: tasks whose figures mean nothing, and why."""

    exact: list[Row]
    replay: list[Row]
    warnings: list[str]


def run_harness(
    jobs: Sequence[HarnessJob], out: Path, command: str, *, add: bool = False
) -> list[Row]:
    """Run one job after another and write results after each. Raises SuiteError.

    add: keep what earlier runs left in `out`; see `Earlier`.

    The files in `out` always hold what has been measured so far.
    """
    found: list[Row] = []
    # lm-eval's own seed for few-shot examples, so that figures compare with other people's.
    about = describe(jobs[0].model, command, seed=1234)
    stopwatch = Stopwatch(command)
    about["versions"]["lm-eval"] = version("lm-eval")
    about["warnings"] = []
    if jobs[0].source is not None:
        about["documents"] = f"part {jobs[0].source.part}"
    earlier = open_earlier(out, about) if add else None
    for number, job in enumerate(jobs, start=1):
        name = ", ".join(method.name for method in job.methods)
        print(f"[{number}/{len(jobs)}] {name}", flush=True)
        if any(method.tokens or method.whole_prompt for method in job.methods):
            print("    skipped: it can't store the chunks of prompts of different lengths")
            continue
        outcome = run_child("kvtc_vllm.evaluation.processes.harness", name, job, HarnessOutcome)
        if len(job.methods) > 1:
            about["exact passes"] = SHARED_PASSES
        known = {row.task for row in found}
        found += [row for row in outcome.exact if row.task not in known]
        found += outcome.replay
        about["warnings"] += [text for text in outcome.warnings if text not in about["warnings"]]
        about["seconds"] = stopwatch.read()
        everything = earlier.joined(about, found) if earlier else (about, found)
        report.write_rows(out, *everything)
        (out / "results.md").write_text(markdown(*everything), encoding="utf-8")
    if not found:
        raise SuiteError("none of the methods can run lm-eval tasks")
    return found


def markdown(about: dict[str, Any], found: Sequence[Row]) -> str:
    """A table per task and longest prompt, a line per method, with lm-eval's metrics."""
    lines = ["# lm-eval tasks over reloaded prefixes", ""]
    lines += report.head({key: value for key, value in about.items() if key != "warnings"})
    lines += [
        "",
        "Every prompt was computed exactly and stored, the GPU cache dropped, and the prompt "
        "replayed with its prefix from the tier. Brackets: lm-eval's standard error times 1.96; "
        "of a change, that of the differences to the exact run, document by document. "
        "Reloaded share: prompt tokens that came from the tier. The order of sums in a replay "
        "is not that of the exact run, so raw shows how far figures move by rounding alone.",
        "",
    ]
    lines += [f"**Warning: {text}**\n" for text in about["warnings"]]
    for task, context in dict.fromkeys((row.task, row.context) for row in found):
        own = [row for row in found if (row.task, row.context) == (task, context)]
        metrics = list(dict.fromkeys(row.metric for row in own))
        lines += [f"## {task}, prompts of up to {context} tokens", ""]
        lines.append("| method | real ratio | " + " | ".join(metrics) + " |")
        lines.append("|" + "---|" * (len(metrics) + 2))
        for method in dict.fromkeys(row.method for row in own):
            values = {row.metric: row for row in own if row.method == method}
            ratio = next(iter(values.values())).real_ratio
            cells = [_cell(values.get(metric)) for metric in metrics]
            lines.append(f"| {method} | {ratio:.1f} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    low, high = row.ci95
    interval = f" [{low:.3f}, {high:.3f}]" if low < high and high < float("inf") else ""
    return f"{row.value:.3f}{interval}"
