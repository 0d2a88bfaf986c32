"""Conversations in vLLM through the capacity cliff, the same host memory for every kind of offload.

    python -m benchmarks.gpu.serving
    python -m benchmarks.gpu.serving --modes none,raw --conversations 4,16 --seconds 300
    python -m benchmarks.gpu.serving --device cpu --tiny --out /tmp/rows.json

As Table 22 of the paper: a number of clients, no time to think, a long context, then short
questions and answers. The GPU cache holds only a few conversations (--slots, which is also the
batch), so that others are evicted. Modes: `none` (recompute), `raw` (this project's tier,
uncompressed), `native` (vLLM's OffloadingConnector), `kvtc-8x`, `kvtc-16x` and `kvtc2-16x`, all
with --budget bytes of host memory. The reference model has no artifact of codec 2.

The 8B model has random weights and a synthetic artifact (see dummy_model.py): speed and bytes
count, its words and its reconstruction error mean nothing. The reference model is real, shipped
with its artifact, and tiny. One process a mode, with scheduler and worker in it as in a server's
engine core; one row a number of conversations, written as it comes. A row says `from_tier` if
vLLM and the connector agree on every reloaded token. If one does not, if a load or a mode failed,
or if kvtc reloaded nothing with many conversations, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.child import guarded, report, rows_of
from benchmarks.gpu.report import append, parser
from kvtc_vllm.config import parse_bytes

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "reference_model" / "model"
MODES = ("none", "raw", "native", "kvtc-8x", "kvtc-16x", "kvtc2-16x")
START_SECONDS = 60
"""A mode with less time left is not started."""


@dataclass(frozen=True)
class Case:
    """One process: a mode, a model, and the load of every row."""

    mode: str
    model: str
    path: str
    artifacts: dict[str, str]
    """Directory of the artifact of each codec; none for the reference model, whose are shipped."""
    vocabulary: int
    device: str
    conversations: tuple[int, ...]
    context: int
    question: int
    answer: int
    returns: int
    slots: int
    budget: int
    staging: str
    block_size: int
    batched_tokens: int
    load_gate: bool
    eager: bool
    backend: str | None


def main() -> int:
    """Run every model and mode; exit status as the module says."""
    args = _arguments()
    if args.child is not None:
        case = _case(json.loads(args.child))
        return guarded(lambda: serve(case))
    device = torch.device(args.device)
    ends = time.monotonic() + args.seconds
    good = True
    with tempfile.TemporaryDirectory(prefix="kvtc-serving-") as directory:
        for model in args.models.split(","):
            made = _model(model, args.tiny, _longest(args), Path(directory))
            for mode in args.modes.split(","):
                good &= _run(_make_case(args, mode, model, made), args.out, device, ends)
    return int(not good)


def _run(case: Case, out: Path, device: torch.device, ends: float) -> bool:
    """All rows of one process; whether everything was as it should be."""
    about = {"bench": "serving", "model": case.model, "mode": case.mode}
    left = ends - time.monotonic()
    reason = _not_here(case) or ("no time left" if left < START_SECONDS else None)
    if reason:
        append(out, [about | {"skipped": reason}], device)
        return reason != "no time left"
    settings = {
        "slots": case.slots,
        "budget_bytes": case.budget,
        "question_tokens": case.question,
        "answer_tokens": case.answer,
        "returns": case.returns,
        "eager": case.eager,
        "load_gate": case.load_gate,
    }
    good = True
    arguments = ["--child", json.dumps({f.name: getattr(case, f.name) for f in fields(case)})]
    try:
        for row in rows_of("benchmarks.gpu.serving", arguments, out.with_name("serving.log"), left):
            append(out, [about | settings | row], device)
            good &= "error" not in row and _reloaded(case, row)
    except RuntimeError as error:
        append(out, [about | {"error": str(error)}], device)
        return False
    return good


def _reloaded(case: Case, row: dict[str, Any]) -> bool:
    """Whether what was reloaded came from the tier; and that kvtc, which has room, reloaded."""
    if not row.get("from_tier", True):
        return False
    evicted = case.mode.startswith("kvtc") and row["conversations"] > 2 * case.slots
    return not evicted or row["reloaded_tokens"] + row["gated_tokens"] > 0


def _not_here(case: Case) -> str | None:
    if case.mode == "native" and case.device != "cuda":
        return "vLLM's own offloading needs a GPU"
    if case.mode.startswith("kvtc2") and not case.artifacts:
        return "no artifact of codec 2 of this model"
    return None


def serve(case: Case) -> None:
    """The child: an engine, and a row for every number of conversations."""
    from benchmarks.gpu.closed_loop import Load, hold
    from benchmarks.gpu.dummy_model import spread_weights
    from kvtc_vllm.connector import register
    from tests.connector.engine import engine

    register()  # the plugin's entry point is only there when the package was installed
    began = time.perf_counter()
    with engine(Path(case.path), _connector(case), **_options(case)) as llm:
        if case.artifacts:
            llm.apply_model(spread_weights)
        started = time.perf_counter() - began
        loads = [
            Load(
                conversations,
                case.context,
                case.question,
                case.answer,
                case.returns,
                case.vocabulary,
            )
            for conversations in case.conversations
        ]
        # What is compiled or allocated at the first use is nobody's turn.
        hold(llm, Load(1, case.context, case.question, 2, 1, case.vocabulary), seed=0)
        for load in loads:
            report({**hold(llm, load, seed=load.conversations), "start_s": round(started, 1)})


def _connector(case: Case) -> dict[str, Any] | None:
    """Our connector's configuration, if the mode has one."""
    if case.mode in ("none", "native"):
        return None
    extra: dict[str, Any] = {
        "preset": case.mode,
        "memory_bytes": case.budget,
        "staging_bytes": case.staging,
        "load_gate": case.load_gate,
    }
    codec = case.mode.split("-")[0]
    if codec in case.artifacts:
        extra["artifact"] = case.artifacts[codec]
    return extra


def _options(case: Case) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    from vllm.config import KVTransferConfig

    longest = _longest(case)
    blocks = -(-longest // case.block_size) + 1
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "enforce_eager": case.eager,
        "max_model_len": longest,
        "block_size": case.block_size,
        "num_gpu_blocks_override": case.slots * blocks + 1,
        "max_num_batched_tokens": case.batched_tokens,
        "max_num_seqs": case.slots,
        "skip_tokenizer_init": True,
        "gpu_memory_utilization": 0.6,
    }
    if case.backend is not None:
        options["attention_backend"] = case.backend
    if case.artifacts:
        options["load_format"] = "dummy"
    if case.mode == "native":
        options["kv_transfer_config"] = KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": case.budget},
        )
    return options


def _model(model: str, tiny: bool, longest: int, directory: Path) -> dict[str, Any]:
    """Path, artifacts and vocabulary of a model, made if there is none."""
    if model == "reference":
        return {"path": str(REFERENCE), "artifacts": {}, "vocabulary": 2048}
    from benchmarks.gpu.dummy_model import SMALL, write_artifact, write_model
    from benchmarks.gpu.random_model import ModelShape

    shape = SMALL if tiny else ModelShape()
    positions = 1 << (longest - 1).bit_length()
    path = write_model(directory / model, shape, positions)
    # K and V of 4 layers in one row are as long as K of 8.
    groups = {"kvtc": 2, "kvtc2": 1} if tiny else {"kvtc": 8, "kvtc2": 4}
    made = {
        codec: write_artifact(
            directory / f"{model}-{codec}", path, shape, positions, (8.0, 16.0), layers, codec
        )
        for codec, layers in groups.items()
    }
    artifacts = {codec: str(artifact) for codec, artifact in made.items()}
    return {"path": str(path), "artifacts": artifacts, "vocabulary": shape.vocabulary}


def _longest(of: argparse.Namespace | Case) -> int:
    """Tokens of a conversation at its end, and one."""
    return int(of.context + of.answer + of.returns * (of.question + of.answer) + 1)


def _make_case(args: argparse.Namespace, mode: str, model: str, made: dict[str, Any]) -> Case:
    given = {f.name: getattr(args, f.name) for f in fields(Case) if hasattr(args, f.name)}
    return _case({**given, **made, "mode": mode, "model": model})


def _case(values: dict[str, Any]) -> Case:
    return Case(**{**values, "conversations": tuple(values["conversations"])})


def _arguments() -> argparse.Namespace:
    made = parser("serving", __doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--modes", default=",".join(MODES))
    made.add_argument(
        "--models", help="llama-8b, reference; default the first, with --tiny the second"
    )
    made.add_argument("--conversations", help="numbers of clients; default 2,4,6,8,16,24")
    made.add_argument("--context", type=int, help="tokens of the first turn; default 8192")
    made.add_argument("--question", type=int, help="tokens; default 64")
    made.add_argument("--answer", type=int, help="tokens; default 32")
    made.add_argument("--returns", type=int, help="turns after the first; default 2")
    made.add_argument("--slots", type=int, help="conversations in the GPU cache; default 4")
    made.add_argument("--budget", help="host memory of the tier; default 8GiB")
    made.add_argument("--staging", default="auto", help="for KV that waits for encoding")
    made.add_argument("--batched-tokens", type=int, help="of one step; default 8192")
    made.add_argument("--backend", help="attention backend; default vLLM's choice")
    made.add_argument("--seconds", type=float, default=540, help="for everything")
    made.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument(
        "--load-gate", action=argparse.BooleanOptionalAction, help="default: not with --tiny"
    )
    made.add_argument("--child", help=argparse.SUPPRESS)
    args = made.parse_args()
    defaults = _TINY if args.tiny else _FULL
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if isinstance(args.conversations, str):
        args.conversations = tuple(map(int, args.conversations.split(",")))
    args.budget = parse_bytes("budget", args.budget)
    return args


_FULL: dict[str, Any] = {
    "models": "llama-8b",
    "conversations": (2, 4, 6, 8, 16, 24),
    "context": 8192,
    "question": 64,
    "answer": 32,
    "returns": 2,
    "slots": 4,
    "budget": "8GiB",
    "batched_tokens": 8192,
    "block_size": 16,
    "load_gate": True,
}
_TINY: dict[str, Any] = {
    "models": "reference",
    "conversations": (2, 6),
    "context": 512,
    "question": 32,
    "answer": 4,
    "returns": 2,
    "slots": 2,
    "budget": "6MiB",
    "batched_tokens": 2048,
    "block_size": 32,
    # On a CPU recomputing a small model's prefill may well be faster than decoding.
    "load_gate": False,
}


if __name__ == "__main__":
    sys.exit(main())
