"""A result as a person reads it: a table, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROWS = (
    ("requests answered", "completed", "{:,.0f}"),
    ("requests failed", "failed", "{:,.0f}"),
    ("time to first token, median (ms)", "median_ttft_ms", "{:,.0f}"),
    ("  of first turns", "median_ttft_first_turn_ms", "{:,.0f}"),
    ("  of later turns", "median_ttft_later_turns_ms", "{:,.0f}"),
    ("time to first token, 99th percentile (ms)", "p99_ttft_ms", "{:,.0f}"),
    ("inter-token latency, median (ms)", "median_itl_ms", "{:,.1f}"),
    ("output tokens per busy second", "output_throughput", "{:,.1f}"),
    ("all tokens per busy second", "total_token_throughput", "{:,.1f}"),
)
METRIC_ROWS = (
    ("prompt tokens", "prompt_tokens", "{:,.0f}"),
    ("  hit in vLLM's own cache", "gpu_hit_tokens", "{:,.0f}"),
    ("  hit in the connector's tiers", "tier_hit_tokens", "{:,.0f}"),
    ("  share of hits", "hit_rate", "{:.1%}"),
    ("bytes of KV over bytes stored", "kvtc_ratio", "{:.2f}"),
)


def table(result: dict[str, Any]) -> str:
    """Figures of all servers side by side, in aligned columns."""
    servers = result["servers"]
    lines = [("", *(server["url"] for server in servers))]
    for title, key, form in ROWS:
        lines.append((title, *(_cell(server, key, form) for server in servers)))
    if all("metrics" in server for server in servers):
        for title, key, form in METRIC_ROWS:
            lines.append((title, *(_cell(server["metrics"], key, form) for server in servers)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
    if "paired" in result:
        text += ["", *_paired(result["paired"])]
    return "\n".join(text)


def plot(result: dict[str, Any], path: Path) -> None:
    """Distribution of the time to first token, first and later turns apart, one line per server."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, later, title in ((axes[0], False, "first turns"), (axes[1], True, "later turns")):
        for place, server in enumerate(result["servers"]):
            values = sorted(
                row["ttft_ms"]
                for row in result["requests"]
                if row["server"] == place and not row["error"] and bool(row["turn"]) is later
            )
            shares = [(index + 1) / len(values) for index in range(len(values))]
            axis.step(values, shares, where="post", label=server["url"])
        axis.set_title(title)
        axis.set_xlabel("time to first token (ms)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def _cell(figures: dict[str, Any], key: str, form: str) -> str:
    return form.format(figures[key]) if key in figures else "-"


def _aligned(line: tuple[str, ...], widths: list[int]) -> list[str]:
    title, *cells = line
    return [title.ljust(widths[0])] + [
        cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)
    ]


def _paired(paired: dict[str, Any]) -> list[str]:
    lines = [f"equal answers: {paired['equal_answers']:.1%} of {paired['turns']} turns"]
    for title, key in (("all turns", "ttft_ratio"), ("later turns", "ttft_ratio_later_turns")):
        if paired[key]:
            mean, low, high = paired[key]
            lines.append(
                f"time to first token, second over first, {title}: "
                f"{mean:.3f} (95 %: {low:.3f} to {high:.3f})"
            )
    return lines
