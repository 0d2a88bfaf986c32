"""Results as files: results.json, Markdown tables, and the plot of `plot.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvtc_vllm.evaluation.reporting import seconds
from kvtc_vllm.evaluation.reporting.plot import plot
from kvtc_vllm.evaluation.reporting.results import EXACT, Row, damaged, unanswered


def write(directory: Path, about: dict[str, Any], found: Sequence[Row]) -> None:
    """Write results.json, results.md and results.png.

    about: command, model, versions, machine: whatever someone needs to repeat the run.
    """
    write_rows(directory, about, found)
    (directory / "results.md").write_text(markdown(about, found), encoding="utf-8")
    plot(directory / "results.png", found)


def write_rows(directory: Path, about: dict[str, Any], found: Sequence[Row]) -> None:
    """Write results.json alone."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "rows": [msgspec.to_builtins(row) for row in found]}
    encoded = msgspec.json.format(msgspec.json.encode(content), indent=1)
    (directory / "results.json").write_bytes(encoded + b"\n")


def read(path: Path) -> list[Row]:
    """Rows of a results.json, in which an infinite bound is null."""
    rows = msgspec.json.decode(path.read_bytes())["rows"]
    for row in rows:
        low, high = row["ci95"]
        row["ci95"] = (
            float("-inf") if low is None else low,
            float("inf") if high is None else high,
        )
    return msgspec.convert(rows, list[Row])


def head(about: dict[str, Any]) -> list[str]:
    """Lines that say what was run: an item for each part of `about`."""
    shown = {**about, "seconds": seconds.told([about])} if "seconds" in about else about
    return [f"- {key}: {value}" for key, value in shown.items()]


def markdown(about: dict[str, Any], found: Sequence[Row]) -> str:
    """A table per task and context: a line per method, in order of real ratio."""
    lines = ["# Quality of reloaded prefixes", ""]
    lines += head(about)
    lines += [
        "",
        "Every prompt was computed exactly and stored, the GPU cache dropped, and the prompt "
        "replayed with its prefix from the tier. NLL and KL are nats per token of the scored "
        "target; changes are against the exact run of the same prompt; brackets are 95 % "
        "bootstrap intervals over prompts. Real ratio: bytes of the KV in the cache's dtype over "
        "bytes stored, all headers, scales and sinks counted.",
        "",
    ]
    if any(row.read_ratio for row in found):
        lines += [
            "Methods that drop or recall tokens ran in transformers, not through the tier. Where a "
            "query reads less than is stored, *read* is bytes of the KV over bytes that one query "
            "reads.",
            "",
        ]
    lines += summary(found)
    silent = unanswered(found)
    for task, context in dict.fromkeys((row.task, row.context) for row in found):
        here = [row for row in found if (row.task, row.context) == (task, context)]
        lines += [f"## {task}, context {context}", ""]
        if (task, context) in silent:
            lines += [
                f"Accuracy is left out: the exact run answers {silent[task, context]:.0%}.",
                "",
            ]
            here = [row for row in here if not row.metric.startswith("accuracy")]
        lines += _table([row for row in here if not row.label])
        for title, metric, form in (("Accuracy", "accuracy", "{:.0%}"), ("KL", "kl", "{:.4f}")):
            labelled = [row for row in here if row.label and row.metric == metric]
            if labelled:
                methods = dict.fromkeys(row.method for row in labelled)
                pairs = [(method, method) for method in methods]
                table = label_table("method", labelled, pairs, metric, form)
                lines += [f"{title}:", "", *table, ""]
    return "\n".join(lines)


def summary(found: Sequence[Row]) -> list[str]:
    """KL, and accuracy where the exact run answers: a line per method, a column per task."""
    silent = unanswered(found)
    means = [row for row in found if not row.label]
    tasks = list(dict.fromkeys((row.task, row.context) for row in means))
    head = " | ".join(f"{task} {context}" for task, context in tasks)
    lines = [
        "## All tasks",
        "",
        "KL, and accuracy where the exact run answers enough.",
        "",
        f"| method | real ratio | {head} |",
        "|" + "---|" * (len(tasks) + 2),
    ]
    for method in dict.fromkeys(row.method for row in means):
        own = [row for row in means if row.method == method]
        ratios = sorted(row.real_ratio for row in own)
        cells = [method, "" if method == EXACT else _span(ratios[0], ratios[-1])]
        for task in tasks:
            figures = {row.metric: row for row in own if (row.task, row.context) == task}
            texts = [_cell(figures, "kl", "{:.4f}", interval=False)]
            if task not in silent:
                texts.append(_cell(figures, "accuracy", "{:.0%}", interval=False))
            cells.append(", ".join(text for text in texts if text))
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _span(low: float, high: float) -> str:
    """Two figures with one decimal, or one if they are the same."""
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f}-{high:.1f}"


def _table(found: Sequence[Row]) -> list[str]:
    has_answers = any(row.metric == "accuracy" for row in found)
    reads = any(row.read_ratio for row in found)
    head = ["method", "real ratio", *(["read"] if reads else []), "NLL", "NLL change", "KL"]
    head += ["same top token"]
    head += ["accuracy"] if has_answers else []
    lines = ["| " + " | ".join([*head, "damaged"]) + " |", "|" + "---|" * (len(head) + 1)]
    methods = sorted(dict.fromkeys((r.real_ratio, r.method) for r in found))
    for real_ratio, method in methods:
        own = {r.metric: r for r in found if r.method == method}
        cells = [method, f"{real_ratio:.1f}"]
        if reads:
            read = max(row.read_ratio for row in own.values())
            cells.append(f"{read:.1f}" if read else "")
        cells.append(_cell(own, "nll", "{:.3f}", interval=False))
        cells += [_cell(own, "nll_change", "{:+.4f}"), _cell(own, "kl", "{:.4f}")]
        cells += [_cell(own, "top1_agreement", "{:.1%}", interval=False)]
        cells += [_cell(own, "accuracy", "{:.0%}")] if has_answers else []
        reasons = list(damaged(own.values()).values())
        cells.append(reasons[0] if reasons else "")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def label_table(
    head: str,
    found: Sequence[Row],
    lines: Sequence[tuple[str, str]],
    metric: str = "accuracy",
    form: str = "{:.0%}",
) -> list[str]:
    """A metric of one task and context by label: a line per method, a column per label.

    head: what the first column is. lines: text of the first column, and the method, of each line.
    form: how a figure is written.
    """
    labels = sorted({row.label for row in found})
    table = [f"| {head} | " + " | ".join(labels) + " |", "|" + "---|" * (len(labels) + 1)]
    for text, method in lines:
        own = {r.label: r.value for r in found if r.method == method and r.metric == metric}
        cells = [form.format(own[label]) if label in own else "" for label in labels]
        table.append(f"| {text} | " + " | ".join(cells) + " |")
    return table


def _cell(own: dict[str, Row], metric: str, form: str, interval: bool = True) -> str:
    row = own.get(metric)
    if row is None:
        return ""
    text = form.format(row.value)
    if interval and row.n > 1:
        text += f" [{form.format(row.ci95[0])}, {form.format(row.ci95[1])}]"
    return text
