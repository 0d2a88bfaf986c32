"""The long versions of the reliability tests; writes results.json and results.md beside itself.

    make soak [MINUTES=20]      or
    python -m benchmarks.reliability.soak --minutes 20 [--endurance-minutes 60]

Aims at 2,000 kill cycles, 5 rounds over every kill point, 2,000 kill cycles with damaged
bookkeeping and hostile entries, 2,000,000 mutated containers and 1,000,000 operations of 8
processes, in slices with a seed of their own each, and stops a driver
where its share of the time ends: the results say how far each came. The share of endurance is
used up whole. Exit status 1 if any promise was broken. The files are written after every driver: a
soak that is ended early leaves what it found, and which drivers did not end.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import kvtc_vllm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class Driver(NamedTuple):
    """One kind of test. aim: units in all. slice: units a process. share: of the time."""

    name: str
    module: str
    option: str
    unit: str
    aim: int
    slice: int
    share: float


DRIVERS = (
    Driver("kill -9", "tests.reliability.kill9", "--cycles", "cycles", 2000, 200, 0.15),
    Driver("kill at every call", "tests.reliability.kill9", "--points", "rounds", 5, 1, 0.1),
    Driver(
        "kill -9, damaged bookkeeping and hostile entries",
        "tests.reliability.hostile",
        "--cycles",
        "cycles",
        2000,
        100,
        0.2,
    ),
    Driver(
        "mutated containers",
        "benchmarks.reliability.mutations",
        "--count",
        "mutations",
        2_000_000,
        50_000,
        0.25,
    ),
    Driver(
        "8 processes, one directory",
        "tests.reliability.replicas",
        "--operations",
        "operations",
        1_000_000,
        40_000,
        0.2,
    ),
)
ENDURANCE = "endurance"
ENDURANCE_SHARE = 0.1
TOTALS = (
    "killed",
    "damaged",
    "chunks_checked",
    "temporaries_left_by_kills",
    "divergences",
    "failures",
)
LARGEST = ("slowest_seconds", "largest_allocation_bytes")


def main() -> int:
    """Run every driver for its share of the time; write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--endurance-minutes", type=float, help="instead of its share")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    seconds = args.minutes * 60
    began = time.time()
    load_before = os.getloadavg()
    seed = int(began)
    results: list[dict[str, Any]] = []
    about = {
        "command": " ".join(("python -m benchmarks.reliability.soak", *sys.argv[1:])),
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "seed": seed,
    }

    def found(result: dict[str, Any]) -> None:
        results.append(result)
        print(result, flush=True)
        report = about | {
            "minutes": round((time.time() - began) / 60, 1),
            "machine": machine(),
            "load_average": {"before": load_before, "after": os.getloadavg()},
            "results": results,
            "not_ended": not_ended(results),
        }
        (args.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
        (args.out / "results.md").write_text(markdown(report))

    for driver in DRIVERS:
        found(soak(driver, driver.share * seconds, seed))
    minutes = args.endurance_minutes or ENDURANCE_SHARE * args.minutes
    found(endurance(minutes * 60, seed))
    return 0 if all(result["ok"] for result in results) else 1


def not_ended(results: list[dict[str, Any]]) -> list[str]:
    """Names of the drivers that are not among the results."""
    names = [*(driver.name for driver in DRIVERS), ENDURANCE]
    return [name for name in names if name not in {result["name"] for result in results}]


def soak(driver: Driver, seconds: float, seed: int) -> dict[str, Any]:
    """Slices until the aim or the end of the time; stops at the first that fails."""
    began = time.monotonic()
    done = 0
    totals: dict[str, float] = {}
    ok = True
    error = ""
    while ok and done < driver.aim and time.monotonic() - began < seconds:
        amount = min(driver.slice, driver.aim - done)
        ok, found, error = call(driver.module, driver.option, str(amount), "--seed", str(seed))
        for name in TOTALS:
            if name in found:
                totals[name] = totals.get(name, 0) + found[name]
        for name in LARGEST:
            if name in found:
                totals[name] = max(totals.get(name, 0), found[name])
        done += amount if ok else 0
        seed += 1000
    return {
        "name": driver.name,
        "unit": driver.unit,
        "aim": driver.aim,
        "done": done,
        "ok": ok,
        **totals,
        "seconds": round(time.monotonic() - began, 1),
        **({} if ok else {"error": error}),
    }


def endurance(seconds: float, seed: int) -> dict[str, Any]:
    """One process for all of the time: what creeps needs time to show."""
    ok, found, error = call(
        "benchmarks.reliability.endurance", "--seconds", str(seconds), "--seed", str(seed)
    )
    return {"name": ENDURANCE, "ok": ok, **found, **({} if ok else {"error": error})}


def call(module: str, *arguments: str) -> tuple[bool, dict[str, Any], str]:
    """Whether it succeeded, the dictionary it printed, and the end of its error output."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    found = ast.literal_eval(lines[-1]) if lines else {}
    return process.returncode == 0, found, process.stderr[-2000:]


def machine() -> dict[str, Any]:
    """Where it ran."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "kvtc_vllm": kvtc_vllm.__version__,
        "commit": commit,
    }


def markdown(report: dict[str, Any]) -> str:
    """A table for people."""
    where = report["machine"]
    lines = [
        "# Reliability soak",
        "",
        f"`{report['command']}`, {report['date']}, {report['minutes']} minutes, "
        f"{where['cpus']} CPUs, Linux {where['kernel']}, Python {where['python']}, "
        f"load average {report['load_average']['before'][0]:.1f} before and "
        f"{report['load_average']['after'][0]:.1f} after.",
        "",
        "| what | done | aim | broken promises | found |",
        "|---|---|---|---|---|",
    ]
    for result in report["results"]:
        known = ("name", "unit", "aim", "done", "ok", "error", "failures", "broken", "examples")
        details = ", ".join(
            f"{name.replace('_', ' ')} {_text(value)}"
            for name, value in result.items()
            if name not in known
        )
        done = f"{result['done']:,} {result['unit']}" if "done" in result else ""
        aim = f"{result['aim']:,}" if "aim" in result else ""
        verdict = "0" if result["ok"] else "**yes**"
        lines.append(f"| {result['name']} | {done} | {aim} | {verdict} | {details} |")
    if report["not_ended"]:
        lines += ["", f"Ended before these did: {', '.join(report['not_ended'])}."]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if whole else str(value)


if __name__ == "__main__":
    sys.exit(main())
