"""The demo's table and plot."""

from __future__ import annotations

from pathlib import Path

from benchmarks.demo.conversations import RunReport

COLUMNS = (
    "run",
    "prompt tok",
    "computed",
    "reloaded",
    "MiB held",
    "ratio",
    "resident",
    "budget fits",
    "TTFT mean",
    "TTFT p95",
    "equal answers",
)


def table(runs: dict[str, RunReport], chats: int) -> str:
    """Plain-text table, one line a run."""
    rows = [COLUMNS]
    for name, r in runs.items():
        rows.append(
            (
                name,
                str(r.prompt_tokens),
                str(r.computed_tokens),
                str(r.reloaded_tokens),
                f"{r.stored_bytes / 2**20:.2f}" if r.stored_bytes else "-",
                f"{r.ratio:.1f}x" if r.ratio else "-",
                f"{r.conversations_resident}/{chats}",
                str(r.conversations_fit),
                f"{r.ttft_mean_s * 1e3:.0f} ms",
                f"{r.ttft_p95_s * 1e3:.0f} ms",
                f"{r.answers_equal_fraction:.0%}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot(runs: dict[str, RunReport], path: Path) -> None:
    """Where prompt tokens came from, what they cost to keep, and time to first token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(runs)
    figure, (tokens, size, ttft) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    computed = [r.computed_tokens for r in runs.values()]
    reloaded = [r.reloaded_tokens for r in runs.values()]
    tokens.bar(names, computed, label="computed", color="#b0b0b0")
    tokens.bar(names, reloaded, bottom=computed, label="reloaded", color="#2a7f62")
    tokens.set_title("prompt tokens")
    tokens.legend()
    bars = size.bar(names, [r.conversations_fit for r in runs.values()], color="#3b6ea5")
    size.bar_label(bars)
    budget = max(r.budget_bytes for r in runs.values()) / 2**20
    size.set_title(f"conversations that {budget:.0f} MiB hold")
    places = range(len(names))
    mean = [r.ttft_mean_s * 1e3 for r in runs.values()]
    p95 = [r.ttft_p95_s * 1e3 for r in runs.values()]
    ttft.bar([p - 0.2 for p in places], mean, 0.4, label="mean", color="#c07820")
    ttft.bar([p + 0.2 for p in places], p95, 0.4, label="p95", color="#e0b060")
    ttft.set_xticks(list(places), names)
    ttft.set_title("time to first token, returns (ms)")
    ttft.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
