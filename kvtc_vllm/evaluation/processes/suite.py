"""A whole comparison: every method in a child process of its own, then one report."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kvtc_vllm.evaluation.job import Job, Outcome, SharedJob, Workload
from kvtc_vllm.evaluation.methods import Method
from kvtc_vllm.evaluation.reporting import report
from kvtc_vllm.evaluation.reporting.earlier import Earlier
from kvtc_vllm.evaluation.reporting.results import Row, exact_rows, rows
from kvtc_vllm.evaluation.reporting.seconds import Stopwatch
from kvtc_vllm.evaluation.tasks import Source

CPU_CACHE, CPU_CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE", "2"
"""On the CPU only, where vLLM would otherwise ask for most of the machine."""

T = TypeVar("T")

CHILD = "kvtc_vllm.evaluation.processes.run_method"
SHARED_PASSES = "shared by methods; chunks are encoded when they are loaded"
"""What reports say of methods that share."""
SHARED_CHILD = "kvtc_vllm.evaluation.processes.run_shared"
PREFIX_CHILD = "kvtc_vllm.evaluation.processes.run_prefixes"
"""Methods that drop or recall tokens, in transformers."""


class SuiteError(RuntimeError):
    """A method could not be measured. partial: what its process wrote before it failed."""

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


def run_suite(
    model: str,
    plan: Sequence[tuple[Method, list[Workload]]],
    *,
    seed: int,
    source: Source | None,
    engine: dict[str, Any],
    out: Path,
    command: str,
    share: bool = False,
    add: bool = False,
) -> list[Row]:
    """Measure every method on its workloads and write the report after each. Raises SuiteError
    in the end if a method failed; the others are measured nevertheless.

    share: methods that can run their replays over one exact pass, in one process.
    add: keep what earlier runs left in `out`; see `Earlier`.

    The report on disk always holds what has been measured so far.
    """
    found: list[Row] = []
    failures: list[str] = []
    used: dict[str, None] = {}
    about = describe(model, command, seed)
    stopwatch = Stopwatch(command)
    earlier = open_earlier(out, about) if add else None
    groups = _groups(plan, share)
    for number, (methods, workloads) in enumerate(groups, start=1):
        name = ", ".join(method.name for method in methods)
        print(f"[{number}/{len(groups)}] {name}", flush=True)
        common: dict[str, Any] = {
            "model": model,
            "workloads": workloads,
            "seed": seed,
            "source": source,
            "engine": engine,
            "out": "",
        }
        try:
            if share or methods[0].tokens is not None:
                shared = SharedJob(methods=methods, **common)
                child = SHARED_CHILD if methods[0].tokens is None else PREFIX_CHILD
                outcomes = run_child(child, name, shared, list[Outcome])
            else:
                single = Job(method=methods[0], **common)
                outcomes = [run_child(CHILD, name, single, Outcome)]
        except SuiteError as error:
            print(f"    failed: {error}")
            failures.append(str(error))
            if not isinstance(error.partial, list):
                continue
            outcomes = error.partial
        for reason in outcomes[0].skipped:
            print(f"    skipped: {reason}")
        for outcome in outcomes:
            known = {(row.task, row.context) for row in found}
            found += [row for row in exact_rows(outcome) if (row.task, row.context) not in known]
            found += rows(outcome)
        used.update(dict.fromkeys(outcomes[0].documents))
        if source is not None and used:
            about["documents"] = describe_documents(source, used)
        if share:
            about["exact passes"] = SHARED_PASSES
        about["seconds"] = stopwatch.read()
        report.write(out, *(earlier.joined(about, found) if earlier else (about, found)))
    if failures:
        raise SuiteError("; ".join(failures))
    return found


def open_earlier(out: Path, about: dict[str, Any]) -> Earlier:
    """Results in `out`, to add to. Raises SuiteError if they are of something else."""
    try:
        return Earlier(out, about)
    except ValueError as error:
        raise SuiteError(str(error)) from None


def _groups(
    plan: Sequence[tuple[Method, list[Workload]]], share: bool
) -> list[tuple[list[Method], list[Workload]]]:
    """Methods that run together, with their workloads; all alone unless they are to share."""
    groups: list[tuple[list[Method], list[Workload]]] = []
    for method, workloads in plan:
        together = [
            own
            for own, theirs in groups
            if share and method.can_share(own[0]) and theirs == workloads
        ]
        if together:
            together[0].append(method)
        else:
            groups.append(([method], workloads))
    return groups


def run_child(module: str, name: str, job: msgspec.Struct, outcome: type[T]) -> T:
    """Run `python -m module JOB.json`, which writes an `outcome` to the job's field `out`, as
    MessagePack (JSON has no infinite intervals).

    name: what errors call the job. Progress and errors of the child process go to our
    stderr. Raises SuiteError.
    """
    with tempfile.TemporaryDirectory(prefix="kvtc-job-") as directory:
        path, out = Path(directory) / "job.json", Path(directory) / "outcome.msgpack"
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(job, out=str(out))))
        environment = {
            **os.environ,
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            CPU_CACHE: os.environ.get(CPU_CACHE, CPU_CACHE_GIB),
        }
        result = subprocess.run([sys.executable, "-m", module, str(path)], env=environment)
        written = msgspec.msgpack.decode(out.read_bytes(), type=outcome) if out.exists() else None
        if result.returncode or written is None:
            raise SuiteError(f"{name}: its process ended with {result.returncode}", written)
        return written


def describe(model: str, command: str, seed: int) -> dict[str, Any]:
    """What a reader needs to repeat a run."""
    return {
        "command": command,
        "model": Path(model).name if Path(model).is_dir() else model,
        "seed": seed,
        "versions": {name: _version(name) for name in ("kvtc-vllm", "vllm", "torch")},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
    }


def describe_documents(source: Source, names: Iterable[str]) -> str:
    """Which public documents were read, by data set and number, and of which part."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        data_set, _, number = name.rpartition(" ")
        numbers.setdefault(data_set, []).append(int(number))
    parts = [f"{name} {', '.join(map(str, sorted(own)))}" for name, own in sorted(numbers.items())]
    return (
        f"part {source.part}; numbers modulo 4 are 0 and 1 for calibration, 2 for tuning, 3 for "
        f"reports: {'; '.join(parts)}"
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
