"""Draws the dashboard's panels from a Prometheus, for documents and machines without Grafana.

python -m tools.pictures http://localhost:9090 --minutes 30 --model MODEL --out panels.png
"""

from __future__ import annotations

import argparse
import json
import math
import time
import urllib.parse
import urllib.request
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.dashboard import COLUMNS, PANELS, Panel

STEPS = 240
MOST_LEGENDS = 6
Series = list[tuple[str, list[tuple[float, float]]]]
"""Legend, and (seconds, value) of each line."""


def main() -> None:
    """Write one picture of all panels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="address of Prometheus")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--end", type=float, default=time.time(), help="Unix time; default: now")
    parser.add_argument("--model", default=".*", help="regular expression of model_name")
    parser.add_argument("--window", default="1m", help="of rates")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    start = args.end - 60 * args.minutes
    rows = math.ceil(len(PANELS) / COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 2.6 * rows), layout="constrained")
    for axis, panel in zip(figure.subplots(rows, COLUMNS).flat, PANELS, strict=False):
        draw(axis, panel, series(args.url, panel, args.model, args.window, start, args.end), start)
    figure.savefig(args.out, dpi=80)


def series(url: str, panel: Panel, model: str, window: str, start: float, end: float) -> Series:
    """All lines of a panel. Raises SystemExit if Prometheus refuses a query."""
    found: Series = []
    for expr, legend in panel.queries:
        query = expr.replace("$model", model).replace("$__rate_interval", window)
        step = max(1.0, (end - start) / STEPS)
        asked = {"query": query, "start": start, "end": end, "step": step}
        address = f"{url.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(address, timeout=60) as response:
            answer = json.loads(response.read())
        if answer["status"] != "success":
            raise SystemExit(f"{panel.title}: {answer}")
        for line in answer["data"]["result"]:
            reason = line["metric"].get("reason", "")
            points = [(float(when), float(value)) for when, value in line["values"]]
            found.append((legend.replace("{{reason}}", reason), points))
    return found


def draw(axis: Axes, panel: Panel, lines: Series, start: float) -> None:
    """One panel; lines that are 0 throughout have no legend."""
    for legend, points in lines:
        values = [value for _, value in points]
        shown = legend if any(value and not math.isnan(value) for value in values) else ""
        axis.plot([(when - start) / 60 for when, _ in points], values, label=shown or None, lw=1.2)
    axis.set_title(panel.title, fontsize=10)
    axis.set_ylabel(panel.unit, fontsize=8)
    axis.set_xlabel("minutes", fontsize=8)
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        axis.legend(handles[:MOST_LEGENDS], labels[:MOST_LEGENDS], fontsize=7)


if __name__ == "__main__":
    main()
