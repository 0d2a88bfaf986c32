"""Fronts, and bytes at equal KL, on curves whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import quality_front
from kvtc_vllm.evaluation.reporting import report
from kvtc_vllm.evaluation.reporting.front import (
    Point,
    curve_of,
    equal_kl,
    neighbours,
    pareto_front,
    pooled,
)
from kvtc_vllm.evaluation.reporting.results import Row

CONTEXT = 640


def row(method: str, ratio: float, sessions: list[float], task: str = "essays") -> Row:
    return Row(
        task=task,
        method=method,
        plan="",
        real_ratio=ratio,
        context=CONTEXT,
        label="",
        metric="kl",
        value=float(np.mean(sessions)),
        ci95=(min(sessions), max(sessions)),
        n=len(sessions),
        by_session=sessions,
    )


def square_law(
    name: str, scale: float, ratios: tuple[float, ...] = (8, 16, 32, 64), task: str = "essays"
) -> list[Row]:
    """KL is scale * ratio squared, in sessions of different difficulty."""
    return [
        row(name.format(r), r, [scale * r * r * part for part in (0.5, 1.0, 1.5)], task)
        for r in ratios
    ]


def points(rows: list[Row]) -> list[Point]:
    return pooled(rows, [("essays", CONTEXT)])


def test_curves_are_named_without_their_ratio() -> None:
    assert curve_of("kvtc-16x") == curve_of("kvtc-8.5x") == "kvtc"
    assert curve_of("kvtc-16x sinks coded") == "kvtc sinks coded"
    assert curve_of("kvtc2-64x ordinary") == "kvtc2 ordinary"
    assert curve_of("kivi-2bit") is None


def test_front_keeps_what_nothing_beats() -> None:
    found = [row("a", 2, [0.1]), row("b", 4, [0.1]), row("c", 8, [0.5]), row("d", 6, [0.7])]
    assert [r.method for r in pareto_front(found)] == ["b", "c"]


def test_a_factor_between_measured_ratios_is_exact_for_a_power_law() -> None:
    curve = points(square_law("kvtc2-{:g}x", 1e-5))
    (reference,) = points([row("kivi-2bit", 5.0, [1e-5 * 400 * part for part in (0.5, 1.0, 1.5)])])
    factor = equal_kl(reference, curve)
    assert factor.value == pytest.approx(20 / 5)
    # Both are hard on the same sessions, so that drawing them anew changes nothing.
    assert (factor.low, factor.high) == pytest.approx((4, 4))
    assert not factor.open_above
    assert not factor.open_below


def test_nothing_is_extrapolated() -> None:
    curve = points(square_law("kvtc2-{:g}x", 1e-5))
    (above,) = points([row("bad", 4.0, [1.0, 1.0, 1.0])])
    factor = equal_kl(above, curve)
    assert (factor.value, factor.open_above, factor.open_below) == (pytest.approx(16), True, False)
    (below,) = points([row("good", 4.0, [1e-6, 1e-6, 1e-6])])
    factor = equal_kl(below, curve)
    assert (factor.value, factor.open_above, factor.open_below) == (pytest.approx(2), False, True)


def test_a_noisy_curve_is_taken_as_rising() -> None:
    noisy = [row("kvtc2-8x", 8, [0.1, 0.1]), row("kvtc2-16x", 16, [0.05, 0.05])]
    (reference,) = points([row("kivi-2bit", 4, [0.07, 0.07])])
    assert equal_kl(reference, points(noisy)).open_below


def test_tasks_together_have_all_sessions_and_all_bytes() -> None:
    rows = [row("a", 4, [1.0, 3.0]), row("a", 8, [5.0], "maths"), row("b", 4, [1.0, 3.0])]
    (point,) = pooled(rows, [("essays", CONTEXT), ("maths", CONTEXT)])
    assert point.method == "a"
    assert point.real_ratio == pytest.approx(2 / (1 / 4 + 1 / 8))
    assert point.sessions.tolist() == [1.0, 3.0, 5.0]


def test_methods_of_other_sessions_are_left_out() -> None:
    rows = [row("a", 4, [1.0, 3.0]), row("b", 4, [1.0])]
    assert [point.method for point in points(rows)] == ["a"]


def test_neighbours_are_compared_prompt_by_prompt() -> None:
    """Prompts differ by far more than methods; one method is always worse, one by chance."""
    prompts = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    chance = prompts * [3.0, 1.0, 2.5, 1.0, 1.5]
    found = neighbours(
        [Point("worse", 8, 1.2 * prompts), Point("best", 4, prompts), Point("chance", 4, chance)]
    )
    assert [(own.method, own.before) for own in found] == [("worse", "best"), ("chance", "worse")]
    assert (found[0].times, found[0].low, found[0].high) == pytest.approx((1.2, 1.2, 1.2))
    assert found[0].apart
    assert found[1].low < 1 < found[1].high
    assert not found[1].apart


def test_the_command_writes_picture_and_page(tmp_path: Path) -> None:
    rows = [
        *square_law("kvtc-{:g}x", 2e-5),
        *square_law("kvtc2-{:g}x", 1e-5),
        row("kivi-2bit", 5.0, [0.05, 0.1, 0.15]),
    ]
    report.write_rows(tmp_path, {"command": "kvtc eval"}, rows)
    quality_front.main([str(tmp_path), "--together", "essays:640"])
    page = (tmp_path / "front.md").read_text()
    assert "| essays 640 | kvtc2-8x, kvtc2-16x, kvtc2-32x, kvtc2-64x |" in page
    assert "| kvtc-16x | 16.0 | 0.0051 |  | 1.41 [1.41, 1.41] |" in page
    assert "| kvtc-8x | 0.0013 | kvtc2-8x | 2.00 [2.00, 2.00] |" in page
    assert (tmp_path / "results.png").stat().st_size > 5000
    with pytest.raises(SystemExit):
        quality_front.main([str(tmp_path), "--together", "maths:640"])


def test_the_committed_page_is_that_of_the_results() -> None:
    directory = quality_front.ROOT / "benchmarks/quality/smollm2/methods"
    found = report.read(directory / "results.json")
    running = [("essays", 640), ("library", 640), ("maths", 640)]
    tasks = list(dict.fromkeys((row.task, row.context) for row in found))
    page = (directory / "front.md").read_text()
    assert quality_front.markdown(found, tasks, [running]) == page
    pairs = neighbours([point for point in pooled(found, running) if point.method != "raw"])
    apart = sum(pair.apart for pair in pairs)
    text = (quality_front.ROOT / "docs/quality.md").read_text()
    assert f"{apart} of {len(pairs)} neighbours are told apart" in text
