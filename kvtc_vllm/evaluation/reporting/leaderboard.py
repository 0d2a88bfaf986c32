"""One table of all methods out of several results over the same prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kvtc_vllm.evaluation.reporting.front import kl_rows, pareto_front
from kvtc_vllm.evaluation.reporting.results import EXACT, Row, unanswered

SAME_EXACT_RELATIVE, SAME_EXACT_NATS = 0.02, 0.01
"""Differences up to which two exact runs can be of the same prompts: bfloat16 and float32."""
Task = tuple[str, int]


def joined(results: Sequence[Sequence[Row]], tasks: Sequence[Task]) -> list[Row]:
    """Rows of these tasks out of all results, of which the first is the reference.

    A task of a later result whose exact run is of other prompts is left out; so is a method that
    an earlier result has on the task.
    """
    kept: list[Row] = []
    for found in results:
        known = {(row.task, row.context, row.method) for row in kept}
        before = {(row.task, row.context): row for row in kept if _is_exact_loss(row)}
        ours = {(row.task, row.context): row for row in found if _is_exact_loss(row)}
        same = {
            task
            for task in tasks
            if task in ours and (task not in before or _agree(ours[task], before[task]))
        }
        kept += [
            row
            for row in found
            if (row.task, row.context) in same
            and not row.label
            and (row.task, row.context, row.method) not in known
        ]
    return kept


def _is_exact_loss(row: Row) -> bool:
    return (row.method, row.metric, row.label) == (EXACT, "nll", "")


def _agree(row: Row, before: Row) -> bool:
    rounding = SAME_EXACT_NATS + SAME_EXACT_RELATIVE * abs(before.value)
    return row.n == before.n and abs(row.value - before.value) <= rounding


@dataclass(frozen=True)
class Line:
    """A method. low, high: real ratios over its tasks. read: KV over what one query reads, least.

    kl: by task. accuracy: by task, where it says something. on_front: tasks on whose Pareto front
    it is. advantage: how many times fewer bytes the curve stores at its KL on running text, and
    "<" or ">" where the measured curve ends before; None if it was not measured on all of that.
    """

    method: str
    low: float
    high: float
    read: float
    kl: dict[Task, float]
    accuracy: dict[Task, float]
    on_front: frozenset[Task]
    advantage: tuple[str, float] | None


def lines(
    rows: Sequence[Row],
    tasks: Sequence[Task],
    running: Sequence[Task],
    curve: Sequence[str],
    unranked: frozenset[tuple[str, Task]] = frozenset(),
) -> list[Line]:
    """A line per method, by falling real ratio. curve: methods, by rising ratio.

    unranked: methods and tasks whose figures are no part of a front, as they were measured in
    another way.
    """
    silent = unanswered(rows)
    ranked = [r for r in rows if (r.method, (r.task, r.context)) not in unranked]
    fronts = {task: {row.method for row in pareto_front(kl_rows(ranked, *task))} for task in tasks}
    methods = dict.fromkeys(row.method for row in rows if row.method != EXACT)
    points = {method: _point(rows, method, running) for method in methods}
    measured = [point for name in curve if (point := points.get(name)) is not None]
    found = []
    for method in methods:
        own = [row for row in rows if row.method == method]
        ratios = [row.real_ratio for row in own]
        point = points[method]
        found.append(
            Line(
                method=method,
                low=min(ratios),
                high=max(ratios),
                read=min(row.read_ratio for row in own),
                kl=_by_task(own, "kl"),
                accuracy={t: v for t, v in _by_task(own, "accuracy").items() if t not in silent},
                on_front=frozenset(task for task in tasks if method in fronts[task]),
                advantage=_advantage(point, measured) if point and len(measured) > 1 else None,
            )
        )
    return sorted(found, key=lambda line: (-line.high, line.method))


def _by_task(own: Iterable[Row], metric: str) -> dict[Task, float]:
    return {(row.task, row.context): row.value for row in own if row.metric == metric}


def _point(rows: Iterable[Row], method: str, tasks: Sequence[Task]) -> tuple[float, float] | None:
    """Real ratio of all bytes together and mean KL over these tasks, if all were measured."""
    own = {
        (row.task, row.context): row
        for row in rows
        if row.method == method and row.metric == "kl" and (row.task, row.context) in tasks
    }
    if len(own) < len(tasks) or not all(row.real_ratio for row in own.values()):
        return None
    ratio = len(own) / sum(1 / row.real_ratio for row in own.values())
    return ratio, sum(row.value for row in own.values()) / len(own)


def _advantage(
    point: tuple[float, float], curve: Sequence[tuple[float, float]]
) -> tuple[str, float]:
    """Log KL is taken as linear in log ratio between measured points; nothing is extrapolated."""
    ratio, kl = point
    ratios, kls = (np.array(part) for part in zip(*curve, strict=True))
    reached = np.exp(np.interp(np.log(max(kl, 1e-12)), np.log(kls), np.log(ratios)))
    sign = ">" if kl > kls[-1] else "<" if kl < kls[0] else ""
    return sign, float(reached / ratio)
