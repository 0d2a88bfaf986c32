"""The demos' table and plot, and one answer side by side."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from benchmarks.demo.conversations import RunReport

COLUMNS = (
    "run",
    "budget MiB",
    "TTFT mean",
    "of recompute",
    "TTFT p95",
    "found again",
    "reloaded tok",
    "computed tok",
    "MiB held",
    "real ratio",
    "budget fits",
    "equal answers",
    "equal words",
)
_GREY, _GREEN, _BLUE, _ORANGE, _SAND = "#9a9a9a", "#2a7f62", "#3b6ea5", "#c07820", "#e0b060"


def table(runs: dict[str, RunReport], chats: int, baseline: str) -> str:
    """Plain-text table, one line per run. baseline: the run without offload."""
    rows = [COLUMNS]
    for name, r in runs.items():
        rows.append(
            (
                name,
                f"{r.budget_bytes / 2**20:.0f}" if r.budget_bytes else "-",
                f"{r.ttft_mean_s * 1e3:.0f} ms",
                f"{r.ttft_mean_s / runs[baseline].ttft_mean_s:.2f}",
                f"{r.ttft_p95_s * 1e3:.0f} ms",
                f"{r.conversations_resident}/{chats}",
                str(r.reloaded_tokens),
                str(r.computed_tokens),
                f"{r.stored_bytes / 2**20:.1f}" if r.stored_bytes else "-",
                f"{r.ratio:.1f}" if r.ratio else "-",
                str(r.conversations_fit) if r.budget_bytes else "-",
                f"{r.answers_equal_fraction:.0%}",
                f"{r.words_equal_fraction:.0%}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(runs: dict[str, RunReport], chats: int, baseline: str) -> str:
    """The table of the README. baseline: the run without offload."""
    lines = [
        f"| run | host memory | real ratio | found again, of {chats} | mean time to first token "
        "| of recompute | p95 | answers equal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in runs.items():
        memory = f"{r.budget_bytes / 2**20:,.0f} MiB" if r.budget_bytes else "-"
        lines.append(
            f"| {name} | {memory} | {f'{r.ratio:.1f}' if r.ratio else '-'} "
            f"| {r.conversations_resident} | {1e3 * r.ttft_mean_s:.0f} ms "
            f"| {r.ttft_mean_s / runs[baseline].ttft_mean_s:.2f} | {1e3 * r.ttft_p95_s:.0f} ms "
            f"| {100 * r.answers_equal_fraction:.0f} % |"
        )
    return "\n".join(lines)


def side_by_side(sample: dict[str, Any]) -> str:
    """One question and what every run answered. sample: as in the demo's report.json."""
    width = max(map(len, sample["answers"]))
    lines = [f"One answer, about the page {sample['page']!r}: {sample['question']}"]
    for name, answer in sample["answers"].items():
        text = textwrap.fill(" ".join(answer.split()), 96, subsequent_indent=" " * (width + 4))
        lines.append(f"  {name.rjust(width)}  {text}")
    return "\n".join(lines)


def plot(runs: dict[str, RunReport], chats: int, baseline: str, path: Path) -> None:
    """What a return costs, how many conversations are found again, and what they take to keep."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name.replace(", ", ",\n") for name in runs]
    reports = list(runs.values())
    figure, (ttft, found, size) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    places = range(len(names))
    mean = [r.ttft_mean_s * 1e3 for r in reports]
    p95 = [r.ttft_p95_s * 1e3 for r in reports]
    bars = ttft.bar([p - 0.2 for p in places], mean, 0.4, label="mean", color=_ORANGE)
    ttft.bar([p + 0.2 for p in places], p95, 0.4, label="p95", color=_SAND)
    whole = runs[baseline].ttft_mean_s * 1e3
    ttft.bar_label(bars, [f"{value / whole:.2f}" for value in mean], fontsize=8)
    ttft.set_xticks(list(places), names, fontsize=8)
    ttft.set_title("time to first token of a return, ms\n(on top: of recompute)", fontsize=10)
    ttft.legend(fontsize=8)
    bars = found.bar(names, [r.conversations_resident for r in reports], color=_GREEN)
    found.bar_label(bars)
    found.axhline(chats, color=_GREY, linewidth=1)
    found.tick_params(axis="x", labelsize=8)
    budget = min((r.budget_bytes for r in reports if r.budget_bytes), default=0) / 2**20
    found.set_title(
        f"of {chats} conversations, found again at the end\n(budget: {budget:.0f} MiB)", fontsize=10
    )
    whole_bytes = max(r.raw_bytes for r in reports) / 2**20
    kept = {name: r for name, r in zip(names, reports, strict=True) if r.ratio}
    bars = size.bar(list(kept), [whole_bytes / r.ratio for r in kept.values()], color=_BLUE)
    size.bar_label(bars, [f"{whole_bytes / r.ratio:.0f}" for r in kept.values()])
    size.axhline(budget, color=_GREY, linewidth=1, linestyle="dashed", label="budget")
    size.tick_params(axis="x", labelsize=8)
    size.set_title("MiB that all conversations take", fontsize=10)
    size.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
