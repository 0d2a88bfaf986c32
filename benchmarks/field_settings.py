"""Which setting of each method of the field is taken: from sweeps on the tuning part.

    python -m benchmarks.field_settings

Reads results.json of `kvtc eval --part tune` in benchmarks/quality/smollm2/field/sweep/*, and
writes README.md there. More bytes buy less KL, so settings are compared by KL / ratio^s: s is the
slope of log KL in log real ratio of `kvtc` on the same tasks (of the reporting part, where it was
measured), so the figure says how far a setting is from the curve of our own codec, whatever its
bytes. Tasks count alike (mean of the logarithms). For methods that recall tokens the ratio is of
what a query reads. A method of another width in bits (`kivi-4bit`) is a method of its own. Nothing
is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kvtc_vllm.evaluation.reporting import report
from kvtc_vllm.evaluation.reporting.front import curve_of, kl_rows
from kvtc_vllm.evaluation.reporting.results import EXACT, Row

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/quality/smollm2"
DIRECTORY = RESULTS / "field/sweep"
Task = tuple[str, int]


def main() -> None:
    """Write the page."""
    (DIRECTORY / "README.md").write_text(page(*read()), encoding="utf-8")
    print(DIRECTORY / "README.md")


def read() -> tuple[dict[str, list[Row]], list[Row]]:
    """Rows by sweep, and those that have `kvtc` at several ratios on the same tasks."""
    found = {
        path.parent.name: report.read(path) for path in sorted(DIRECTORY.glob("*/results.json"))
    }
    tasks = {(row.task, row.context) for rows in found.values() for row in rows}
    curve = report.read(RESULTS / "methods/results.json")
    return found, [row for row in curve if (row.task, row.context) in tasks]


def slopes(rows: Sequence[Row]) -> dict[Task, float]:
    """Of log KL in log real ratio, by task, of plain `kvtc` at all of its ratios."""
    found = {}
    for task in dict.fromkeys((row.task, row.context) for row in rows):
        own = [row for row in kl_rows(rows, *task) if curve_of(row.method) == "kvtc"]
        if len(own) > 1:
            logs = np.log([(row.real_ratio, row.value) for row in own])
            found[task] = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
    return found


def figure(rows: Sequence[Row], method: str, slope: float) -> float:
    """KL / ratio^slope, geometric mean over tasks."""
    own = [r for r in rows if r.method == method and r.metric == "kl" and not r.label]
    logs = [
        np.log(max(row.value, 1e-9)) - slope * np.log(row.read_ratio or row.real_ratio)
        for row in own
    ]
    return float(np.exp(np.mean(logs)))


def page(found: Mapping[str, Sequence[Row]], curve: Sequence[Row]) -> str:
    """The page. found, curve: as `read` gives them."""
    by_task = slopes(curve)
    lines = [
        "# Settings of the field's methods",
        "",
        "From `kvtc eval --part tune` (commands in each results.md) by `python -m "
        "benchmarks.field_settings`. Documents whose number modulo 4 is 2; four prompts per task. "
        "The least figure of a method is taken, in bold: KL / ratio^s, geometric mean over tasks, "
        "with s the mean of `kvtc`'s slopes on the tasks of the sweep. Ratios of methods that "
        "recall tokens are of what a query reads. Four prompts settle little: figures within some "
        "ten per cent of each other are not told apart. A method of another width in bits is a "
        "method of its own.",
        "",
    ]
    for name, rows in found.items():
        tasks = list(dict.fromkeys((row.task, row.context) for row in rows))
        slope = float(np.mean([by_task[task] for task in tasks]))
        shown = ", ".join(f"{by_task[task]:.2f} on {task[0]}" for task in tasks)
        head = ["setting", "ratio", *(f"{task} {context}" for task, context in tasks), "figure"]
        lines += [
            f"## {name}",
            "",
            f"[results]({name}/results.md); s = {slope:.2f} ({shown})",
            "",
            f"| {' | '.join(head)} |",
            "|" + "---|" * len(head),
        ]
        methods = [m for m in dict.fromkeys(row.method for row in rows) if m != EXACT]
        best: dict[str, tuple[float, str]] = {}
        for method in methods:
            pair = (figure(rows, method, slope), method)
            key = method.split("/")[0]
            best[key] = min(best.get(key, pair), pair)
        for method in methods:
            chosen = best[method.split("/")[0]][1] == method and curve_of(method) is None
            lines.append(_line(rows, method, tasks, figure(rows, method, slope), chosen))
        lines.append("")
    return "\n".join(lines)


def _line(
    rows: Sequence[Row], method: str, tasks: Sequence[Task], value: float, chosen: bool
) -> str:
    own = {
        (r.task, r.context): r
        for r in rows
        if r.method == method and r.metric == "kl" and not r.label
    }
    ratios = [row.read_ratio or row.real_ratio for row in own.values()]
    low, high = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
    cells = [f"**{method}**" if chosen else method, low if low == high else f"{low}-{high}"]
    cells += [f"{own[task].value:.4f}" if task in own else "" for task in tasks]
    return f"| {' | '.join([*cells, f'{value:.5f}'])} |"


if __name__ == "__main__":
    main()
