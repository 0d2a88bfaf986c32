"""Quality against bytes from results that are there: the plot, and bytes at equal KL.

    python -m benchmarks.quality_front [benchmarks/quality/smollm2/methods]
                                       [--together essays:640,library:640,maths:640]

Reads results.json of `kvtc eval --out`. Draws results.png anew, with the Pareto front of each
task, and writes front.md: which methods are on the fronts, how many times fewer bytes our codecs
store at the KL of every other method and of plain version 1, and which methods that are next to
each other in KL are told apart by these prompts. Tasks given by `--together`
are taken as one, all their sessions alike. Nothing is measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kvtc_vllm.evaluation.reporting import report
from kvtc_vllm.evaluation.reporting.front import (
    Factor,
    Point,
    curve_of,
    equal_kl,
    kl_rows,
    neighbours,
    pareto_front,
    pooled,
)
from kvtc_vllm.evaluation.reporting.plot import BIT_EXACT, plot
from kvtc_vllm.evaluation.reporting.results import Row

ROOT = Path(__file__).parents[1]
Task = tuple[str, int]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="?", metavar="DIR", help="with results.json")
    parser.add_argument("--together", action="append", default=[], metavar="TASK:CONTEXT,...")
    args = parser.parse_args(arguments)
    directory = args.results or ROOT / "benchmarks/quality/smollm2/methods"
    path = directory / "results.json"
    if not path.is_file():
        parser.error(f"{path} is no file; give what kvtc eval --out wrote")
    found = report.read(path)
    tasks = list(dict.fromkeys((row.task, row.context) for row in found))
    together = [_group(parser, text, tasks) for text in args.together]
    plot(directory / "results.png", found)
    (directory / "front.md").write_text(markdown(found, tasks, together), encoding="utf-8")
    print(f"{directory / 'results.png'}, {directory / 'front.md'}")


def _group(parser: argparse.ArgumentParser, text: str, tasks: Sequence[Task]) -> list[Task]:
    """Tasks of one --together, each of which was measured."""
    known = {f"{task}:{context}": (task, context) for task, context in tasks}
    for name in text.split(","):
        if name not in known:
            parser.error(f"--together {name!r} was not measured; give some of {', '.join(known)}")
    return [known[name] for name in text.split(",")]


def markdown(found: Sequence[Row], tasks: Sequence[Task], together: Sequence[list[Task]]) -> str:
    """The page: fronts of single tasks, then bytes at equal KL of all groups and single tasks."""
    lines = [
        "# Quality against bytes",
        "",
        "From results.json by `python -m benchmarks.quality_front`.",
        "",
        "## Pareto fronts",
        "",
        "Methods that no other beats in real ratio and in KL at once, by rising ratio.",
        "",
        "| task | front |",
        "|---|---|",
    ]
    for task, context in tasks:
        points = [row for row in kl_rows(found, task, context) if row.method != BIT_EXACT]
        names = ", ".join(row.method for row in pareto_front(points))
        lines.append(f"| {task} {context} | {names} |")
    lines += [
        "",
        "## Bytes at equal KL",
        "",
        "How many times fewer bytes a codec stores at the KL of the method in the first column. "
        "Between its measured ratios, log KL is taken as linear in log ratio; nothing is "
        "extrapolated: `>` means that even its highest measured ratio has less KL, `<` that its "
        "lowest has more. Brackets: 95 % intervals, sessions drawn anew for both at once.",
        "",
    ]
    groups = [*together, *([task] for task in tasks)]
    for group in groups:
        lines += _equal_kl_table(pooled(found, group), group)
    lines += [
        "## Neighbours",
        "",
        "Methods by rising KL, and how many times the KL of the one before each has. Brackets: "
        "95 % intervals, sessions drawn anew for both at once, so that hard prompts are hard for "
        "both. **Bold**: these prompts do not tell the two apart.",
        "",
    ]
    for group in groups:
        lines += _neighbours_table(pooled(found, group), group)
    return "\n".join(lines)


def _equal_kl_table(points: Sequence[Point], group: Sequence[Task]) -> list[str]:
    """A line per method that is no curve or plain version 1, a column per curve."""
    curves: dict[str, list[Point]] = {}
    for point in points:
        name = curve_of(point.method)
        if name is not None:
            curves.setdefault(name, []).append(point)
    curves = {name: own for name, own in curves.items() if len(own) > 1}
    references = [
        point for point in points if curve_of(point.method) in (None, "kvtc") and point.real_ratio
    ]
    references = [point for point in references if point.method != BIT_EXACT]
    if not curves or not references:
        return []
    lines = [
        _title(references, group),
        "",
        "| at the KL of | real ratio | KL | " + " | ".join(curves) + " |",
        "|" + "---|" * (3 + len(curves)),
    ]
    for point in references:
        cells = [
            "" if curve_of(point.method) == name else _cell(equal_kl(point, own))
            for name, own in curves.items()
        ]
        kl = float(point.sessions.mean())
        lines.append(
            f"| {point.method} | {point.real_ratio:.1f} | {kl:.4f} | " + " | ".join(cells) + " |"
        )
    return [*lines, ""]


def _neighbours_table(points: Sequence[Point], group: Sequence[Task]) -> list[str]:
    """A line per method but the one with the least KL."""
    points = [point for point in points if point.method != BIT_EXACT]
    if len(points) < 2:
        return []
    lines = [_title(points, group), "", "| method | KL | before it | times |", "|---|---|---|---|"]
    for own in neighbours(points):
        times = f"{own.times:.2f} [{own.low:.2f}, {own.high:.2f}]"
        cell = times if own.apart else f"**{times}**"
        lines.append(f"| {own.method} | {own.kl:.4f} | {own.before} | {cell} |")
    return [*lines, ""]


def _title(points: Sequence[Point], group: Sequence[Task]) -> str:
    names = ", ".join(f"{task} {context}" for task, context in group)
    return f"### {names} ({len(points[0].sessions)} sessions)"


def _cell(factor: Factor) -> str:
    sign = "> " if factor.open_above else "< " if factor.open_below else ""
    return f"{sign}{factor.value:.2f} [{factor.low:.2f}, {factor.high:.2f}]"


if __name__ == "__main__":
    main()
