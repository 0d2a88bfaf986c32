"""One table out of several results: same prompts only, fronts, bytes at equal KL."""

from __future__ import annotations

import pytest

from kvtc_vllm.evaluation.reporting.leaderboard import joined, lines
from kvtc_vllm.evaluation.reporting.results import EXACT, Row

TASK = ("essays", 640)
OTHER = ("kv-retrieval", 416)


def row(
    method: str,
    value: float,
    ratio: float = 1.0,
    metric: str = "kl",
    task: tuple[str, int] = TASK,
    read: float = 0.0,
    n: int = 8,
) -> Row:
    return Row(
        task=task[0],
        method=method,
        plan="",
        real_ratio=ratio,
        read_ratio=read,
        context=task[1],
        label="",
        metric=metric,
        value=value,
        ci95=(value, value),
        n=n,
    )


def exact(loss: float, **options: int) -> Row:
    return row(EXACT, loss, metric="nll", **options)


def test_only_results_of_the_same_prompts_are_joined() -> None:
    first = [exact(2.0), row("a", 0.1, 2)]
    rounded = [exact(2.03), row("b", 0.2, 4)]
    others = [exact(2.2), row("c", 0.3, 8)]
    fewer = [exact(2.0, n=4), row("d", 0.3, 8)]
    again = [exact(2.0), row("a", 0.5, 2)]
    found = joined([first, rounded, others, fewer, again], [TASK])
    assert [(r.method, r.value) for r in found if r.metric == "kl"] == [("a", 0.1), ("b", 0.2)]


def test_tasks_that_are_not_asked_for_and_parts_of_a_task_are_left_out() -> None:
    part = row("a", 0.7)
    found = joined([[exact(2.0), row("a", 0.1, 2), row("a", 0.1, task=OTHER)]], [TASK])
    assert [(r.task, r.method) for r in found] == [("essays", EXACT), ("essays", "a")]
    assert part not in found


def test_lines_have_fronts_accuracy_and_what_a_query_reads() -> None:
    rows = [
        exact(2.0),
        row(EXACT, 0.5, metric="accuracy", task=OTHER),
        row("small", 0.10, 8),
        row("small", 0.2, 7, task=OTHER),
        row("small", 0.4, 7, "accuracy", task=OTHER),
        row("worse", 0.11, 8),
        row("fine", 0.01, 2),
        row("recall", 0.02, 0.9, read=6.0),
    ]
    table = {line.method: line for line in lines(rows, [TASK, OTHER], [TASK], ())}
    assert list(table) == ["small", "worse", "fine", "recall"]
    assert (table["small"].low, table["small"].high) == (7, 8)
    assert table["small"].accuracy == {OTHER: 0.4}
    assert table["small"].on_front == {TASK, OTHER}
    assert table["worse"].on_front == frozenset()
    assert table["fine"].on_front == {TASK}
    assert table["recall"].read == 6.0
    assert table["fine"].read == 0.0
    assert table["fine"].advantage is None


def test_accuracy_that_says_nothing_is_left_out() -> None:
    rows = [
        row(EXACT, 0.1, metric="accuracy", task=OTHER),
        row("a", 0.2, 7, task=OTHER),
        row("a", 0.1, 7, "accuracy", task=OTHER),
    ]
    (line,) = lines(rows, [OTHER], [OTHER], ())
    assert line.accuracy == {}


def test_bytes_at_equal_kl_are_between_measured_points() -> None:
    """KL of the curve is 1e-5 * ratio squared: 4e-3 at 20, of what is measured 8 to 64."""
    curve = [f"c{ratio}" for ratio in (8, 16, 32, 64)]
    rows = [row(name, 1e-5 * int(name[1:]) ** 2, int(name[1:])) for name in curve]
    rows += [row("like", 4e-3, 5), row("bad", 1.0, 4), row("good", 1e-5, 2)]
    table = {line.method: line.advantage for line in lines(rows, [TASK], [TASK], curve)}
    assert table["like"] == ("", pytest.approx(4))
    assert table["bad"] == (">", pytest.approx(16))
    assert table["good"] == ("<", pytest.approx(4))
    assert table["c16"] == ("", pytest.approx(1))


def test_bytes_of_several_tasks_are_taken_together() -> None:
    curve = ["c8", "c16"]
    rows = [row(name, 0.1 * (name == "c16") + 0.1, int(name[1:])) for name in curve]
    rows += [row(name, 0.1 * (name == "c16") + 0.1, int(name[1:]), task=OTHER) for name in curve]
    rows += [row("both", 0.1, 4), row("both", 0.1, 12, task=OTHER), row("one", 0.1, 4)]
    table = {line.method: line.advantage for line in lines(rows, [TASK], [TASK, OTHER], curve)}
    # 4x and 12x of as much KV are 6x together.
    assert table["both"] == ("", pytest.approx(8 / 6))
    assert table["one"] is None


def test_what_was_measured_in_another_way_is_on_no_front() -> None:
    """It has its cell, and takes no place on a front from what it can't be compared with."""
    rows = [exact(2.0), row("a", 0.10, 8), row("b", 0.05, 9), row("b", 0.2, 9, task=OTHER)]
    marked = frozenset({("b", TASK)})
    table = {line.method: line for line in lines(rows, [TASK, OTHER], [TASK], (), marked)}
    assert table["a"].on_front == {TASK}
    assert table["b"].on_front == {OTHER}
    assert table["b"].kl == {TASK: 0.05, OTHER: 0.2}
