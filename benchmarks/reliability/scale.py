"""How costs grow: indexes to 5 million chunks, disk to a million files, 256 waiting requests.

    python -m benchmarks.reliability.scale --label after [--parts index,disk,scheduler]

Each part and size runs in a process of its own. Costs are processor time of that process where
nothing else is said, so other programs do not count; medians of repetitions. "pause" is the
longest processor time for which another thread, which wants to note the time every millisecond,
waited for Python's lock; Python hands it over after 5 ms at the soonest. b is the exponent of
cost ~ n^b between the smallest and the largest size.

Results are added to scale.json under the label, and scale.md is written from all labels: the same
measurements of an earlier commit are made by running this file and scale_parts.py there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.reliability.scale_parts import Row, disk, index, scheduler

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SIZES = {
    "index": (100_000, 1_000_000, 5_000_000),
    "disk": (10_000, 100_000, 1_000_000),
    "scheduler": (16, 64, 256),
}
UNITS = {"index": "chunks", "disk": "files", "scheduler": "requests of 32K tokens"}


def measure(part: str, sizes: tuple[int, ...]) -> dict[str, Row]:
    """One process per size."""
    found: dict[str, Row] = {}
    for size in sizes:
        command = [sys.executable, "-m", "benchmarks.reliability.scale", "--one", part, str(size)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{part} {size} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
            continue
        found[str(size)] = json.loads(done.stdout.splitlines()[-1])
        print(part, size, json.dumps(found[str(size)]), flush=True)
    return found


def exponent(small: tuple[int, float], large: tuple[int, float]) -> float | None:
    """b of cost ~ n^b."""
    with suppress(ValueError, ZeroDivisionError):
        return math.log(large[1] / small[1]) / math.log(large[0] / small[0])
    return None


def markdown(labels: dict[str, Any]) -> str:
    """Tables for people, a part each; a line per cost and label."""
    lines = [
        "# How costs grow",
        "",
        "`python -m benchmarks.reliability.scale`; see its docstring for what is measured how.",
        "",
    ]
    for label, run in labels.items():
        lines.append(f"- {label}: {run['date']}, commit {run['commit']}, {run['machine']}")
    for part, unit in UNITS.items():
        sizes = sorted({int(s) for run in labels.values() for s in run["parts"].get(part, {})})
        if not sizes:
            continue
        heads = " | ".join(f"{size:,}" for size in sizes)
        lines += [
            "",
            f"## {part}",
            "",
            f"| {unit} | | {heads} | b |",
            "|---" * (len(sizes) + 3) + "|",
        ]
        names = dict.fromkeys(
            name
            for run in labels.values()
            for row in run["parts"].get(part, {}).values()
            for name in row
        )
        for name in names:
            for label, run in labels.items():
                found = {
                    int(size): row[name]
                    for size, row in run["parts"].get(part, {}).items()
                    if name in row
                }
                if not found:
                    continue
                cells = " | ".join(_text(found.get(size)) for size in sizes)
                small, large = min(found), max(found)
                b = (
                    exponent((small, found[small]), (large, found[large]))
                    if len(found) > 1
                    else None
                )
                lines.append(f"| {name} | {label} | {cells} | {'' if b is None else f'{b:.2f}'} |")
    return "\n".join(lines) + "\n"


def _text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main() -> None:
    """Measure and write, or measure one part at one size and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label", default="after")
    parser.add_argument("--parts", default=",".join(SIZES))
    parser.add_argument("--most", type=int, help="leave out larger sizes")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--one", nargs=2, metavar=("PART", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        parts = {"index": index, "disk": disk, "scheduler": scheduler}
        print(json.dumps(parts[args.one[0]](int(args.one[1]))))
        return
    path = args.out / "scale.json"
    labels: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    run = labels.setdefault(args.label, {"parts": {}})
    run["date"] = time.strftime("%Y-%m-%d")
    run["commit"] = commit or run.get("commit", "")
    run["machine"] = f"{os.cpu_count()} CPUs, Python {platform.python_version()}"
    for part in args.parts.split(","):
        sizes = tuple(size for size in SIZES[part] if args.most is None or size <= args.most)
        run["parts"][part] = measure(part, sizes)
        path.write_text(json.dumps(labels, indent=1) + "\n")
    (args.out / "scale.md").write_text(markdown(labels))


if __name__ == "__main__":
    main()
