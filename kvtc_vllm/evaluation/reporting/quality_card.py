"""The quality card of an artifact: what an operator reads before choosing a ratio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtc_vllm.evaluation.reporting.report import label_table
from kvtc_vllm.evaluation.reporting.results import EXACT, MAX_ACCURACY_DROP, MAX_KL, Row, damaged

FILE = "quality.md"


def write_card(directory: Path, about: dict[str, Any], found: Sequence[Row]) -> Path:
    """Write `quality.md` into an artifact's directory; returns its path.

    found: rows of a suite with this artifact's plans among the methods.
    """
    path = directory / FILE
    path.write_text(card(directory.name, about, found), encoding="utf-8")
    return path


def card(name: str, about: dict[str, Any], found: Sequence[Row]) -> str:
    """The card as Markdown."""
    plans = sorted(
        {(row.plan, row.method) for row in found if row.method.startswith("kvtc-")},
        key=lambda plan: float(plan[0].rstrip("x")),
    )
    tasks = list(dict.fromkeys((row.task, row.context) for row in found))
    lines = [
        f"# Quality of {name}",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        "",
        "Prefixes were stored, dropped from the GPU cache, and reloaded. NLL change: nats per "
        "token against the exact run, with 95 % interval. Accuracy: exact run -> reloaded.",
        "",
        "| plan | real ratio | "
        + " | ".join(f"{task} {context}" for task, context in tasks)
        + " |",
        "|" + "---|" * (len(tasks) + 2),
    ]
    for plan, method in plans:
        own = [row for row in found if row.method == method and not row.label]
        ratios = [row.real_ratio for row in own]
        cells = [_summary(own, task, context) for task, context in tasks]
        span = f"{min(ratios):.1f}-{max(ratios):.1f}"
        lines.append(f"| {plan} | {span} | " + " | ".join(cells) + " |")
    lines += ["", "## Where it breaks", ""]
    lines.append(
        f"A task counts as damaged when the whole interval lies beyond {MAX_KL} nats per token "
        f"of KL or {MAX_ACCURACY_DROP:.0%} of accuracy lost."
    )
    lines.append("")
    for plan, method in plans:
        reasons = damaged([row for row in found if row.method == method])
        text = "; ".join(f"{task} at {context} ({why})" for (task, context), why in reasons.items())
        lines.append(f"- {plan}: {text or 'nothing measured here'}")
    return "\n".join([*lines, *_by_label(found, plans)]) + "\n"


def _summary(own: Sequence[Row], task: str, context: int) -> str:
    values = {r.metric: r for r in own if (r.task, r.context) == (task, context)}
    change = values.get("nll_change")
    if change is None:
        return ""
    text = f"{change.value:+.3f} [{change.ci95[0]:+.3f}, {change.ci95[1]:+.3f}]"
    if "accuracy" in values:
        after = values["accuracy"].value
        before = after - values["accuracy_change"].value
        text += f", {before:.0%} -> {after:.0%}"
    return text


def _by_label(found: Sequence[Row], plans: Sequence[tuple[str, str]]) -> list[str]:
    """Accuracy by depth, hops or turn: a table per task and context."""
    labelled = [r for r in found if r.label and r.metric == "accuracy"]
    lines = []
    for task, context in dict.fromkeys((r.task, r.context) for r in labelled):
        here = [r for r in labelled if (r.task, r.context) == (task, context)]
        lines += ["", f"## Accuracy: {task}, context {context}", ""]
        lines += label_table("plan", here, [("recomputed", EXACT), *plans])
    return lines
