"""Measure what reloading through the tier does to answers, against exact runs and baselines.

    kvtc eval MODEL --methods raw,kvtc-8x,kvtc-16x,kivi-2bit --tasks prose,litm --lengths 1024
    kvtc eval MODEL --quick --out results/
    kvtc eval MODEL --ablation sinks --out results/
    kvtc eval MODEL --lm-eval gsm8k --limit 200 --methods raw,kvtc-16x

Every prompt runs twice through a real vLLM engine: computed and stored, then, with
the GPU cache dropped, replayed with its prefix from the tier. The engine's counters
must confirm it. Writes results.json, results.md and, without --lm-eval, results.png.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtc_vllm.cli.extras import require
from kvtc_vllm.cli.options import add_engine, parse_engine
from kvtc_vllm.config import ConfigError

if TYPE_CHECKING:
    from kvtc_vllm.evaluation.ablations import Plan
    from kvtc_vllm.evaluation.data.public import Source
    from kvtc_vllm.evaluation.methods import Method
    from kvtc_vllm.evaluation.reporting.results import Row

DEFAULT_METHODS = "raw,kvtc-8x,kvtc-16x,kvtc-32x,kvtc-64x,fp8-e4m3,kivi-2bit,gear-2bit"
DEFAULT_LENGTHS = "512,1024"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("model", help="directory or Hugging Face name")
    add(
        "--tasks",
        help="comma-separated, each with an own length as in "
        "'needle:512' or without; default: all, with --data all that read it. With --ablation: "
        "which of its tasks",
    )
    add("--data", type=Path, metavar="DIR", help="public data sets for the tasks that read them")
    add("--part", default="report", help="documents to read: 'report' (default) or 'tune'")
    add("--methods", help=f"comma-separated; default: {DEFAULT_METHODS}")
    add("--lengths", default=DEFAULT_LENGTHS, help="prompt lengths in tokens, comma-separated")
    add("--count", type=int, help="prompts of each task and length (chats: a quarter); default: 32")
    add("--ablation", help="one of the paper's ablations instead of --methods; 'list' lists them")
    add("--lm-eval", metavar="TASKS", help="lm-evaluation-harness tasks instead of --tasks")
    add("--lm-eval-path", type=Path, metavar="DIR", help="further task definitions for --lm-eval")
    add("--limit", type=int, help="documents of each --lm-eval task; default: all")
    add("--few-shot", type=int, help="examples before each --lm-eval question")
    add(
        "--calibration-data",
        nargs="+",
        metavar="PATH",
        help="text for ablations that fit anew, and for baselines that are fitted once per model "
        "(default of these: prose and code of Python's standard library)",
    )
    add("--spool", type=Path, metavar="DIR", help="rows for them that kvtc calibrate --spool kept")
    add("--fits", type=Path, metavar="DIR", help="keep their fits here, and use those there")
    add(
        "--artifact",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="artifact; with a NAME the one of methods such as kvtc-16x@NAME, without it of all "
        "others; default: looked up in the registry. May be repeated",
    )
    add("--card", action="store_true", help="write the quality card into the artifact's directory")
    add(
        "--share-exact",
        action="store_true",
        help="run exact passes once for all methods and encode chunks when they are loaded: faster",
    )
    add(
        "--quick",
        action="store_true",
        help="every method on few short prompts; --methods, --tasks and --count that are given win",
    )
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("kvtc-eval"), help="directory for the results")
    add(
        "--add",
        action="store_true",
        help="keep what earlier runs measured into --out; figures measured again are replaced",
    )
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, report, say where the results are."""
    require("kvtc eval", "eval")
    if args.lm_eval and (args.ablation or args.card):
        raise ConfigError("--lm-eval can't be combined with --ablation or --card")
    if not args.lm_eval and (args.limit is not None or args.few_shot is not None):
        raise ConfigError("--limit and --few-shot go with --lm-eval; --tasks have --count")
    if args.quick and (args.ablation or args.lm_eval):
        raise ConfigError("--quick can't be combined with --ablation or --lm-eval")
    _defaults(args)
    from kvtc_vllm.evaluation.ablations import ABLATIONS
    from kvtc_vllm.evaluation.data.public import DataError
    from kvtc_vllm.evaluation.methods import MethodError
    from kvtc_vllm.evaluation.processes.suite import SuiteError

    if args.ablation == "list":
        for ablation in ABLATIONS.values():
            print(f"{ablation.name:16} {ablation.description}")
        return 0
    command = _shown(sys.argv[1:])
    engine = {**_engine_defaults(), **parse_engine(args.engine)}
    measure = _run_harness if args.lm_eval else _run_tasks
    try:
        found = measure(args, engine, command)
    except (DataError, MethodError, SuiteError) as error:
        raise ConfigError(str(error)) from None
    print((args.out / "results.md").read_text())
    if args.card:
        print(f"quality card: {_write_card(args, command, found)}")
    print(f"results: {args.out / 'results.json'}")
    return 0


def _defaults(args: argparse.Namespace) -> None:
    """Fill in what was not given, in place."""
    from kvtc_vllm.evaluation import quick

    methods, tasks, count = DEFAULT_METHODS, "all", 32
    if args.quick:
        args.share_exact = True
        if args.methods is None:
            methods = ",".join(quick.quick_methods(_ours(args)))
        tasks = quick.TASKS if args.data is None else quick.DATA_TASKS
        count = quick.COUNT
    args.methods = methods if args.methods is None else args.methods
    args.tasks = tasks if args.tasks is None else args.tasks
    args.count = count if args.count is None else args.count


def _ours(args: argparse.Namespace) -> list[str]:
    """Our codecs as --quick runs them; says so where there are none."""
    from kvtc_vllm.evaluation import quick

    ours = quick.our_methods(args.model, _artifacts(args).get(""))
    if not ours:
        ratios = ", ".join(f"{ratio}x" for ratio in quick.RATIOS)
        print(f"no artifact of {args.model} has a plan for {ratios}: our codecs are left out")
    return ours


def _run_tasks(args: argparse.Namespace, engine: dict[str, Any], command: str) -> list[Row]:
    from kvtc_vllm.evaluation.processes.suite import run_suite

    source = _source(args)
    tasks = _tasks(args)
    with tempfile.TemporaryDirectory(prefix="kvtc-ablation-") as work:
        plan = _plan(args, tasks, engine, Path(work))
        return run_suite(
            args.model,
            plan,
            seed=args.seed,
            source=source,
            engine=engine,
            out=args.out,
            command=command,
            share=args.share_exact,
            add=args.add,
        )


def _source(args: argparse.Namespace) -> Source | None:
    from kvtc_vllm.evaluation.data.public import Source

    if args.part not in ("tune", "report"):
        raise ConfigError(f"--part {args.part!r} is not known; give 'tune' or 'report'")
    if args.data is None:
        return None
    if not args.data.is_dir():
        raise ConfigError(f"--data {str(args.data)!r} is not a directory; give one of public data")
    return Source(str(args.data), args.part)


def _tasks(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Tasks and prompt lengths in tokens, from --tasks and --lengths."""
    from kvtc_vllm.evaluation.tasks import DATA_TASKS, TASKS

    lengths = _lengths("--lengths", args.lengths)
    known = {**TASKS, **DATA_TASKS}
    every = TASKS if args.data is None else DATA_TASKS
    found = []
    for text in every if args.tasks == "all" else args.tasks.split(","):
        name, _, own = text.partition(":")
        if name not in known:
            raise ConfigError(f"--tasks {name!r} is not known; give one of {', '.join(known)}")
        if name in DATA_TASKS and args.data is None:
            raise ConfigError(f"--tasks {name!r} reads public documents: give --data DIR")
        found += [(name, length) for length in (_lengths("--tasks", own) if own else lengths)]
    return found


def _run_harness(args: argparse.Namespace, engine: dict[str, Any], command: str) -> list[Row]:
    require("--lm-eval", "eval", "lm_eval")
    from kvtc_vllm.evaluation import methods
    from kvtc_vllm.evaluation.processes.harness_suite import HarnessJob, run_harness

    found = _methods(args)
    jobs = [
        HarnessJob(
            model=args.model,
            methods=together,
            tasks=args.lm_eval.split(","),
            task_path=None if args.lm_eval_path is None else str(args.lm_eval_path),
            limit=args.limit,
            source=_source(args),
            few_shot=args.few_shot,
            engine=engine,
        )
        for together in methods.groups(found, args.share_exact)
    ]
    return run_harness(jobs, args.out, command, add=args.add)


def _plan(
    args: argparse.Namespace,
    tasks: list[tuple[str, int]],
    engine: dict[str, Any],
    work: Path,
) -> Plan:
    from kvtc_vllm.evaluation import ablations
    from kvtc_vllm.evaluation.job import Workload

    if args.spool is not None and not args.spool.is_dir():
        raise ConfigError(
            f"--spool {str(args.spool)!r} is not a directory; give what kvtc calibrate --spool left"
        )
    if args.ablation:
        data = args.calibration_data or ()
        return ablations.plan(
            args.ablation,
            args.model,
            _artifacts(args).get(""),
            data,
            args.count,
            max(_lengths("--lengths", args.lengths)),
            engine,
            args.fits or work,
            source=_source(args),
            spool=args.spool,
            only=None if args.tasks == "all" else [name for name, _ in tasks],
        )
    workloads = [
        Workload(task=task, context=length, count=_sessions(task, args.count))
        for task, length in tasks
    ]
    return [(method, workloads) for method in _methods(args)]


def _methods(args: argparse.Namespace) -> list[Method]:
    from kvtc_vllm.calibration.documents import DataError, read_texts
    from kvtc_vllm.evaluation import methods

    found = [methods.find(name, _artifacts(args)) for name in args.methods.split(",")]
    texts = tuple(args.calibration_data or ())
    try:
        read_texts(texts, 1)  # so that a bad file costs nothing
    except DataError as error:
        raise ConfigError(f"--calibration-data: {error}") from None
    # Figures of a slow machine are then comparable with those of others.
    return [replace(method, texts=texts, sixteen_bits=args.share_exact) for method in found]


def _artifacts(args: argparse.Namespace) -> dict[str, str]:
    """Directories by the name that --artifact gives them; "" without one."""
    found: dict[str, str] = {}
    for text in args.artifact:
        name, equals, directory = text.partition("=")
        if not equals or "/" in name:
            name, directory = "", text
        if name in found:
            raise ConfigError(
                f"--artifact {text!r}: {found[name]!r} has the same name; give NAME=DIR"
            )
        found[name] = directory
    return found


def _sessions(task: str, count: int) -> int:
    """A chat has many prompts, so fewer chats than prompts of other tasks are enough."""
    from kvtc_vllm.evaluation.tasks import CHATS

    return max(2, count // 4) if task in CHATS else count


def _lengths(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) >= 64 for part in parts):
        raise ConfigError(f"{option} {text!r}: give numbers of at least 64, such as 512,1024")
    return [int(part) for part in parts]


def _shown(arguments: list[str]) -> str:
    """The command for results, which others read: of an absolute path only its last name."""

    def short(part: str) -> str:
        name, equals, path = part.rpartition("=")
        return f"{name}{equals}{Path(path).name}" if Path(path).is_absolute() else part

    return "kvtc " + shlex.join(map(short, arguments))


def _engine_defaults() -> dict[str, Any]:
    """On CPU vLLM's blocks are 128 tokens unless told otherwise, which wastes short prompts."""
    import torch

    return {} if torch.cuda.is_available() else {"block_size": 32}


def _write_card(args: argparse.Namespace, command: str, found: list[Row]) -> Path:
    from kvtc_vllm.artifact import registry
    from kvtc_vllm.artifact.identity import model_identity
    from kvtc_vllm.evaluation.processes.suite import describe
    from kvtc_vllm.evaluation.reporting.quality_card import write_card

    ratio = min(float(row.plan.rstrip("x")) for row in found if row.method.startswith("kvtc-"))
    directory = registry.find(
        model_identity(args.model),
        1,
        ratio,
        model_name=args.model,
        artifact=_artifacts(args).get(""),
    )
    return write_card(directory, describe(args.model, command, args.seed), found)
