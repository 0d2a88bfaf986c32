"""What the leaderboard's commands take: as measured, or estimated by method from two prompts each.

`benchmarks.leaderboard` puts it on its page. Reads committed results and measures nothing. Rates
are of `PROBES`, and of `ALSO` for methods that these have not, all in float32; a setting counts as
its method, bits that were not probed as the method's others, every artifact of KVTC as the shipped
one, and methods of which nothing is known as the mean of the other codecs. A command is: a start
per process, then per task the exact run and each method's replays, by the tokens of the prompts.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from kvtc_vllm.cli import eval as command_line
from kvtc_vllm.evaluation import methods
from kvtc_vllm.evaluation.quick import COUNT, DATA_TASKS, quick_methods
from kvtc_vllm.evaluation.reporting import report
from kvtc_vllm.evaluation.reporting.results import EXACT, SECONDS, Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/quality/smollm2"
PROBES = {way: f"field/seconds/{way}" for way in ("tier", "transformers")}
"""Through the tier of vLLM, or by transformers: folders below `RESULTS`, of one command and one
process each."""
ALSO = ("field/float32", "field/chats-float32")
"""Through the tier, of many commands."""
CORES = 2
QUICK_OURS = ("kvtc-8x", "kvtc-16x", "kvtc-32x")
"""Of `kvtc eval --quick`, for a model with such an artifact."""
_OURS = re.compile(r"kvtc2?-\d+x(@\w+| \w+)?")
_BITS = re.compile(r"-[\d.]+bit")
_BELOW = "h2o+kvtc"
"""Tokens dropped before KVTC, whatever drops them."""


@dataclass(frozen=True)
class Rates:
    """Of one way. start: processor seconds of a process beside its runs, fits included.

    by_method: processor seconds per token of a prompt, by `kind`; exact runs are `EXACT`.
    """

    start: float
    by_method: Mapping[str, float]

    def of(self, name: str) -> float:
        """Of a method that was not probed: the mean of its kin, or of all if it has none."""
        own = kind(name)
        if own in self.by_method:
            return self.by_method[own]
        every = {other: rate for other, rate in self.by_method.items() if other != EXACT}
        kin = [rate for other, rate in every.items() if _stem(other) == _stem(own)]
        return fmean(kin or every.values())


@dataclass(frozen=True)
class Estimate:
    """Processor seconds of all commands: `total`, of which `measured` are known from `known`.

    ratios: estimate over measurement, of the commands that are known. guessed: methods, by `kind`,
    that have neither a rate nor kin.
    """

    total: float
    measured: float
    known: int
    commands: int
    ratios: Sequence[float]
    guessed: Sequence[str]

    def _unknown(self) -> str:
        if not self.guessed:
            return ""
        return f"; of {', '.join(self.guessed)} nothing is known, so the mean of the others counts"

    def told(self) -> str:
        """As the pages have it."""
        hours = self.total / 3600
        low, high = (f"{ratio:.1f}" for ratio in (min(self.ratios), max(self.ratios)))
        span = low if low == high else f"{low} to {high}"
        return (
            f"{hours:.1f} processor hours with the model in float32, so {hours / CORES:.1f} hours "
            f"on the clock of {CORES} idle cores, two commands at a time. Most of it ran in "
            "bfloat16, which takes longer on CPUs that do not multiply it. This is an estimate by "
            f"method, from two prompts or more of each{self._unknown()}. Timed are {self.known} of "
            f"{self.commands} commands: they took {self.measured:.0f} processor seconds, for which "
            f"the estimate has {span} times "
            "that"
        )


def quick() -> float:
    """Processor seconds of `kvtc eval smollm2 --data DIR --quick`, estimated."""
    rates = every_rate()
    tasks = [task.partition(":") for task in DATA_TASKS.split(",")]
    command = (
        f"kvtc eval smollm2 --methods {','.join(quick_methods(QUICK_OURS))} --tasks {DATA_TASKS}"
    )
    return of_command(command, {(task, int(size)): COUNT for task, _, size in tasks}, rates)


def estimate(sources: Sequence[str]) -> Estimate:
    """sources: folders of results below `RESULTS`."""
    rates = every_rate()
    total = measured = 0.0
    commands, ratios = 0, []
    guessed: set[str] = set()
    for source in sources:
        said = about(RESULTS / source)
        prompts = _prompts(report.read(RESULTS / source / "results.json"))
        for command in said["command"].split("; "):
            commands += 1
            guess = of_command(command, prompts, rates)
            known = said.get("seconds", {}).get(command)
            if known is not None:
                measured += known["processor"]
                ratios.append(guess / known["processor"])
            else:
                guessed |= unknown(command, rates)
            total += guess if known is None else known["processor"]
    return Estimate(total, measured, len(ratios), commands, ratios, sorted(guessed))


def every_rate() -> dict[str, Rates]:
    """By way; see the top."""
    found = {way: probed(RESULTS / folder) for way, folder in PROBES.items()}
    paths = [RESULTS / folder / "results.json" for folder in ALSO]
    also = by_method([row for path in paths if path.exists() for row in report.read(path)])
    tier = found["tier"]
    return {**found, "tier": Rates(tier.start, {**also, **tier.by_method})}


def of_command(
    command: str, prompts: Mapping[tuple[str, int], int], rates: Mapping[str, Rates]
) -> float:
    """Processor seconds of a `kvtc eval` with --tasks. prompts: scored, by task and context."""
    args = parsed(command)
    names = args.methods.split(",")
    found = [methods.find(name, dict.fromkeys(_labels(names), "")) for name in names]
    ways = ["tier" if method.tokens is None else "transformers" for method in found]
    # Methods that need whole prompts have a process of their own.
    processes = {(way, method.whole_prompt) for way, method in zip(ways, found, strict=True)}
    seconds = sum(rates[way].start for way, _ in processes)
    for task in args.tasks.split(","):
        name, _, context = task.partition(":")
        tokens = prompts[name, int(context)] * int(context)
        seconds += tokens * sum(rates[way].of(EXACT) for way, _ in processes)
        seconds += tokens * sum(
            rates[way].of(method) for way, method in zip(ways, names, strict=True)
        )
    return seconds


def unknown(command: str, rates: Mapping[str, Rates]) -> set[str]:
    """Methods of a command, by `kind`, whose rate is a mean of others that are no kin."""
    known = {kin for rate in rates.values() for kin in map(_stem, rate.by_method)}
    kinds = set(map(kind, parsed(command).methods.split(",")))
    return {own for own in kinds if _stem(own) not in known}


def parsed(command: str) -> argparse.Namespace:
    """The arguments of a `kvtc eval` as results have it."""
    parser = argparse.ArgumentParser()
    command_line.add_arguments(parser)
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("kvtc", "eval")
    return parser.parse_args(arguments)


def probed(directory: Path) -> Rates:
    """What a folder's results say."""
    rows = report.read(directory / "results.json")
    (taken,) = about(directory)["seconds"].values()
    measured = sum(row.value for row in rows if row.metric == SECONDS)
    return Rates(start=taken["processor"] - measured, by_method=by_method(rows))


def by_method(rows: Sequence[Row]) -> dict[str, float]:
    """Processor seconds per token of a prompt, by `kind`, over all settings and tasks."""
    seconds: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for row in rows:
        if row.metric == SECONDS:
            own = kind(row.method)
            seconds[own] = seconds.get(own, 0.0) + row.value
            tokens[own] = tokens.get(own, 0) + row.n * row.context
    return {own: seconds[own] / tokens[own] for own in seconds}


def kind(name: str) -> str:
    """A method as it is probed: without settings, KVTC without ratio and artifact."""
    first, plus, rest = _OURS.sub("kvtc", name).partition("+")
    base = first.split("/")[0]
    if not plus:
        return base
    return f"{base}+{rest}" if base.startswith("fp8") else _BELOW


def about(directory: Path) -> dict[str, Any]:
    """What the results in a directory say of themselves."""
    said: dict[str, Any] = msgspec.json.decode((directory / "results.json").read_bytes())["about"]
    return said


def _stem(kind: str) -> str:
    """Methods that differ in bits alone are kin; what is kept as it is, is like FP8."""
    return "fp8-e4m3" if kind == "raw" else _BITS.sub("", kind)


def _labels(names: Sequence[str]) -> list[str]:
    """Artifacts in the names of methods, and "" for the others'."""
    return ["", *(name.rpartition("@")[2] for name in names if "@" in name)]


def _prompts(rows: Sequence[Row]) -> dict[tuple[str, int], int]:
    """How many are scored of each task and context."""
    return {
        (row.task, row.context): row.n
        for row in rows
        if (row.method, row.metric, row.label) == (EXACT, "nll", "")
    }
