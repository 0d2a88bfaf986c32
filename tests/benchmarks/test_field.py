"""Pages of the field's methods: made from committed results, and the rule that picks settings."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import field_settings, leaderboard
from kvtc_vllm.evaluation.reporting import report
from kvtc_vllm.evaluation.reporting.results import Row


def row(method: str, ratio: float, kl: float, task: str = "essays", read: float = 0.0) -> Row:
    return Row(
        task=task,
        method=method,
        plan="",
        real_ratio=ratio,
        read_ratio=read,
        context=640,
        label="",
        metric="kl",
        value=kl,
        ci95=(kl, kl),
        n=4,
    )


def test_settings_are_compared_along_our_own_curve() -> None:
    """kvtc has KL 1e-5 * ratio squared; a setting is as good wherever it lies on such a curve."""
    ours = [row(f"kvtc-{ratio}x", ratio, 1e-5 * ratio**2) for ratio in (8, 16, 32)]
    assert field_settings.slopes(ours) == {("essays", 640): pytest.approx(2)}
    small, large = row("a", 4, 1e-3), row("a/keep=0.5", 2, 0.3e-3)
    values = [field_settings.figure([small, large], m.method, 2.0) for m in (small, large)]
    assert values == [pytest.approx(1e-3 / 16), pytest.approx(0.3e-3 / 4)]
    page = field_settings.page({"one": [small, large]}, ours)
    assert "| **a** |" in page
    assert "| a/keep=0.5 |" in page
    assert page.count("**") == 2


def test_a_sweep_is_compared_along_the_curve_of_its_own_tasks() -> None:
    """On maths KL grows with the ratio: 2x at a third of the KL wins. On essays it loses."""
    ours = [
        row(f"kvtc-{ratio}x", ratio, ratio**slope, task)
        for task, slope in (("essays", 2), ("maths", 1))
        for ratio in (8, 16)
    ]
    settings = {
        task: [row("a", 4, 3e-3, task), row("a/keep=0.5", 2, 1e-3, task)]
        for task in ("essays", "maths")
    }
    page = field_settings.page(settings, ours)
    essays, maths = page.split("## ")[1:]
    assert "| **a** |" in essays
    assert "| **a/keep=0.5** |" in maths


def test_tasks_count_alike_and_recall_by_what_is_read() -> None:
    rows = [row("r", 0.9, 0.04, read=5.0), row("r", 0.9, 0.01, "maths", read=5.0)]
    assert field_settings.figure(rows, "r", 1.0) == pytest.approx(0.02 / 5)


def test_the_page_of_settings_is_that_of_the_committed_sweeps() -> None:
    page = (field_settings.DIRECTORY / "README.md").read_text()
    assert field_settings.page(*field_settings.read()) == page


def test_the_leaderboard_is_that_of_the_committed_results() -> None:
    rows = leaderboard.read()
    assert leaderboard.page(rows) == leaderboard.PAGE.read_text()
    assert leaderboard.PICTURE.is_file()
    assert {row.task for row in rows} == {task for task, _ in leaderboard.TASKS}
    assert leaderboard.seconds() in leaderboard.QUALITY.read_text()


def test_cells_are_marked_that_no_other_result_has() -> None:
    """An earlier result wins, and shares figures with a later one that say nothing of KL."""
    marked = leaderboard.of_float32(leaderboard.read())
    others = [source for source in leaderboard.SOURCES if source != leaderboard.FLOAT32]
    before = {
        (row.method, (row.task, row.context))
        for source in others
        for row in report.read(leaderboard.RESULTS / source / "results.json")
        if row.metric == "kl"
    }
    assert ("turboquant-3.5bit", ("essays", 640)) in marked
    assert marked & before == set()


def test_the_table_below_kvtc_is_that_of_the_leaderboard() -> None:
    lines = leaderboard.composed(leaderboard.read())
    assert len(lines) > 8
    page = (leaderboard.ROOT / "docs/composing.md").read_text()
    assert "\n".join(lines) in page


def test_every_divergence_in_the_page_on_composing_is_in_a_result() -> None:
    results = leaderboard.RESULTS.glob("**/results.md")
    known = set(re.findall(r"\d\.\d{4}\b", "".join(path.read_text() for path in results)))
    below = json.loads((leaderboard.ROOT / "benchmarks/results/low-rank-below.json").read_text())
    known |= {f"{line['kl']:.4f}" for line in below["rows"]}
    page = (leaderboard.ROOT / "docs/composing.md").read_text()
    quoted = set(re.findall(r"\d\.\d{4}\b", page))
    assert len(quoted) > 50
    assert quoted - known == set()
