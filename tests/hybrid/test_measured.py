"""The tables of docs/models.md are the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtc_vllm.evaluation.reporting.report import read
from kvtc_vllm.evaluation.reporting.results import MIN_EXACT_ACCURACY, Row

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text()
TASKS = {
    "states": ("prose", "code", "litm", "needle", "variable-tracking"),
    "latents": ("prose", "code", "needle"),
}
MEASURED = {
    "states": {
        "raw": "raw",
        "raw, states zeroed": "raw, states zeroed",
        "raw, states bf16": "raw, states bf16",
        "kvtc-8x": "kvtc-8x",
        "kvtc-16x": "kvtc-16x",
        "kvtc-8x weighted": "kvtc-8x, weighted",
        "kvtc-16x weighted": "kvtc-16x, weighted",
        "kvtc-16x weighted, states bf16": "kvtc-16x, weighted, states bf16",
    },
    "latents": {
        "raw": "raw",
        "kvtc-4x": "kvtc-4x",
        "kvtc-8x": "kvtc-8x",
        "kvtc-16x": "kvtc-16x",
        "kvtc-4x weighted": "kvtc-4x, weighted",
        "kvtc-8x weighted": "kvtc-8x, weighted",
        "kvtc-16x weighted": "kvtc-16x, weighted",
    },
}
"""By directory of results: names there, and on the page."""


def line(found: list[Row], tasks: tuple[str, ...], method: str, shown: str) -> str:
    """A row of a table: span of real ratios, then KL per task, and accuracy where it says much."""
    own = {(r.task, r.metric): r for r in found if r.method == method and not r.label}
    exact = {
        r.task: r.value for r in found if (r.method, r.metric, r.label) == ("exact", "accuracy", "")
    }
    spans = sorted({f"{own[task, 'kl'].real_ratio:.1f}" for task in tasks}, key=float)
    cells = [shown, "-".join(dict.fromkeys((spans[0], spans[-1])))]
    for task in tasks:
        cell = f"{own[task, 'kl'].value:.4f}"
        if exact.get(task, 0.0) >= MIN_EXACT_ACCURACY:
            cell += f", {own[task, 'accuracy'].value:.0%}"
        cells.append(cell)
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("directory", MEASURED)
def test_the_table_is_the_committed_one(directory: str) -> None:
    found = read(ROOT / "benchmarks" / "quality" / directory / "tasks" / "results.json")
    lines = [line(found, TASKS[directory], *names) for names in MEASURED[directory].items()]
    assert "\n".join(lines) in PAGE
