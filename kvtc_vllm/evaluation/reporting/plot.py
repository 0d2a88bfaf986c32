"""A plot of KL against real ratio, one panel per task, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvtc_vllm.evaluation.reporting.front import curve_of, kl_rows, pareto_front
from kvtc_vllm.evaluation.reporting.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BIT_EXACT = "raw"
"""Its KL is rounding, orders below all others: it is left out."""
_COLUMNS = 3
_LEAST_KL = 1e-7
_TICKS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Real ratios that the axis names."""


def plot(path: Path, found: Sequence[Row]) -> None:
    """Write the picture: our methods as curves, others as points, the front dashed.

    Of several contexts of a task, the longest is shown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.task for row in found))
    columns = min(_COLUMNS, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    names = sorted({name for row in found if (name := curve_of(row.method)) is not None})
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    for panel, task in zip(axes, tasks, strict=False):
        context = max(row.context for row in found if row.task == task)
        points = [row for row in kl_rows(found, task, context) if row.method != BIT_EXACT]
        _panel(panel, points, colours)
        panel.set_title(f"{task}, context {context}")
    for panel in axes[len(tasks) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=110)


def _panel(panel: Axes, points: Sequence[Row], colours: dict[str, str]) -> None:
    def xy(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
        return [row.real_ratio for row in rows], [max(row.value, _LEAST_KL) for row in rows]

    panel.step(*xy(pareto_front(points)), "--", where="pre", color="black", lw=0.8, label="front")
    for name, colour in colours.items():
        own = [row for row in points if curve_of(row.method) == name]
        if own:
            panel.plot(*xy(own), "o-", ms=4, color=colour, label=name)
    for row in points:
        if curve_of(row.method) is None:
            panel.plot(*xy([row]), "s", ms=4, color="grey")
            panel.annotate(
                row.method,
                (row.real_ratio, max(row.value, _LEAST_KL)),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize="x-small",
            )
    panel.set(
        xscale="log",
        yscale="log",
        xlabel="real ratio",
        ylabel="KL to the exact run, nats per token",
    )
    panel.minorticks_off()
    low, high = panel.get_xlim()
    panel.set_xticks(ticks := [tick for tick in _TICKS if low <= tick <= high], map(str, ticks))
    panel.grid(alpha=0.3)
    panel.legend(fontsize="x-small")
