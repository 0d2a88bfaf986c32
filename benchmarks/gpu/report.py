"""Arguments, timing and JSON rows that the scripts share."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu" / "results.json"
PACKAGES = ("torch", "triton", "nvidia-nvcomp-cu13", "nvidia-nvcomp-cu12", "isal", "vllm")


def parser(script: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    made = argparse.ArgumentParser(prog=f"benchmarks.gpu.{script}", description=description)
    made.add_argument("--out", type=Path, default=RESULTS)
    made.add_argument("--device", default="cuda")
    made.add_argument("--tiny", action="store_true", help="smallest shapes, for a dry run")
    made.add_argument("--rounds", type=int, default=10, help="timed repetitions; medians count")
    return made


def add_codec(made: argparse.ArgumentParser) -> None:
    """Options `codec` and `kv_basis`, named as those of `kvtc calibrate`."""
    made.add_argument("--codec", choices=("kvtc", "kvtc2"), default="kvtc")
    made.add_argument(
        "--kv-basis",
        choices=("each", "shared"),
        default="each",
        help="shared, of kvtc2: K and V of a layer group share a basis",
    )


def synchronize(device: torch.device) -> None:
    """Wait for everything on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median wall time of a call with all its device work, after one warm-up."""
    call()
    synchronize(device)
    times: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {"device": name, "python": platform.python_version(), "versions": versions}


def append(path: Path, rows: list[dict[str, Any]], device: torch.device) -> None:
    """Add rows to a JSON list, and print them."""
    about = machine(device)
    known: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    known += [{**row, "machine": about} for row in rows]
    path.write_text(json.dumps(known, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))
