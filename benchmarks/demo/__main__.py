"""Long chats with a public language model, evicted from vLLM's cache and back, with figures.

    python -m benchmarks.demo [--model DIR] [--chats N] [--turns 3] [--calibrate] [--out build/demo]

Serves SmolLM2 135M Instruct with a paged cache for one conversation and holds six conversations
about pages of text round-robin, so that each returns to find its blocks evicted; fewer, but three
at least, where a first turn takes so long that six would not end in ten minutes. Five times:
without offload, with uncompressed offload that has room for everything, and under one byte
budget that is a tenth of that: uncompressed, and with codec 2 at 16x and 32x. All see the same
prompts. Writes report.json, report.md (the README's table), report.png and answers.json. The
artifact is the one shipped for this model. With `--calibrate`, and for other models, the first
run makes one on this machine and keeps it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.demo import documents, pace
from benchmarks.demo.artifact import describe, find_or_calibrate
from benchmarks.demo.conversations import Answers, RunReport, hold, summarise
from benchmarks.demo.report import markdown, plot, side_by_side, table
from benchmarks.demo.server import Server, end_on_sigterm, serve
from benchmarks.models import ModelError, smollm2
from benchmarks.models.served_dtype import BYTES, served_dtype
from kvtc_vllm.artifact.registry import user_registry
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.config import kv_transfer_config, load_config

ROOT = Path(__file__).resolve().parents[2]
TURNS = 3
"""Contexts are 1.6K to 3.4K tokens."""
BLOCK_SIZE = 32
MAX_MODEL_LEN = 4096
GPU_BLOCKS = MAX_MODEL_LEN // BLOCK_SIZE + 4
"""One conversation of the longest length, and little more."""

RECOMPUTE, ROOMY = "recompute", "raw, with room"
RUNS = (RECOMPUTE, ROOMY, "raw", "kvtc2-16x", "kvtc2-32x")
CODEC, RATIOS = "kvtc2", (16.0, 32.0)
ROOM = "8GiB"
BUDGET_SHARE = 10
"""The budget is what all conversations take uncompressed in 16 bits over this: none of three
or more fits uncompressed, and all fit at a real ratio above it."""
BUDGET_UNIT = 1 << 20
SAMPLE_CHAT = 0
"""The conversation whose last answers are printed side by side."""
SAMPLE_RUNS = (RECOMPUTE, "kvtc2-16x", "kvtc2-32x")


def main() -> int:
    """Run the demo; exit status 0 if every run's counters agree."""
    parser = argparse.ArgumentParser(prog="benchmarks.demo", description=__doc__)
    parser.add_argument("--model", type=Path, help="directory to serve (default: SmolLM2 135M)")
    parser.add_argument(
        "--chats", type=int, help="default: as many as end in ten minutes here, 3 to 6"
    )
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument(
        "--calibrate", action="store_true", help="make the artifact here, whatever is shipped"
    )
    parser.add_argument("--registry", type=Path, default=user_registry(), help="of the artifact")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "demo")
    args = parser.parse_args()
    end_on_sigterm()
    try:
        demo = Demo(args.out, args.chats, args.turns)
        report = demo.run(args.model, args.registry, shipped=not args.calibrate)
    except (ArtifactError, ModelError, RuntimeError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0


class Demo:
    """One run of the demo.

    out: directory for logs and report, made if need be. count: of conversations; None: as many as
    the first server shows to end in time. turns: of each. Raises ValueError for numbers of which
    there are no conversations.
    """

    def __init__(self, out: Path, count: int | None, turns: int) -> None:
        # Numbers that are wrong end it here, before anything is made.
        chats = documents.chats(pace.MOST if count is None else count, turns)
        out.mkdir(parents=True, exist_ok=True)
        self._out = out
        self._turns = turns
        self._chats = [] if count is None else chats
        self._reports: dict[str, RunReport] = {}
        self._answers: dict[str, Answers] = {}
        self._contexts: tuple[int, int] = (0, 0)
        self._seconds: dict[str, float] = {}
        self._dtype = served_dtype()

    def run(self, model: Path | None, registry: Path, *, shipped: bool = True) -> str:
        """Hold the conversations in every run; returns what to print.

        shipped: take the artifact that comes with this package, if it has one of the model.

        Raises ModelError or ArtifactError if there is no model, RuntimeError if a server or the
        calibration fails or the counters of a run disagree, ValueError if the text to calibrate
        on is missing.
        """
        load = os.getloadavg()[0]
        started = time.monotonic()
        model = (model or smollm2()).absolute()
        started = self._took("model", started)
        log = self._out / "calibration.log"
        artifact = find_or_calibrate(
            model, CODEC, RATIOS, self._dtype, registry, log, shipped=shipped
        )
        started = self._took("artifact", started)
        print(describe(artifact), flush=True)
        budget: int | str = ROOM
        for name in RUNS:
            self._hold(name, model, artifact, budget)
            started = self._took(name, started)
            if name == ROOMY:
                budget = _budget(self._reports[name].raw_bytes)
        content: dict[str, Any] = {
            "model": model.name,
            "dtype": self._dtype,
            "runs": msgspec.to_builtins(self._reports),
            "sample": self._sample(),
            "conversations": len(self._chats),
            "context_tokens": self._contexts,
            "calibration": describe(artifact),
            "seconds": {name: round(spent, 1) for name, spent in self._seconds.items()},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at start",
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("kvtc-vllm", "vllm", "torch")},
            },
        }
        (self._out / "report.json").write_text(json.dumps(content, indent=1) + "\n")
        (self._out / "answers.json").write_text(json.dumps(self._answers, indent=1) + "\n")
        readme = markdown(self._reports, len(self._chats), RECOMPUTE)
        (self._out / "report.md").write_text(readme + "\n")
        plot(self._reports, len(self._chats), RECOMPUTE, self._out / "report.png")
        return "\n".join(
            [
                "",
                table(self._reports, len(self._chats), RECOMPUTE),
                "",
                side_by_side(content["sample"]),
                "",
                f"seconds: {', '.join(f'{k} {v:.0f}' for k, v in self._seconds.items())}",
                f"{self._out / 'report.json'}\n{self._out / 'report.png'}",
            ]
        )

    def _hold(self, name: str, model: Path, artifact: Path, budget: int | str) -> None:
        extra = _extra(name, artifact, budget)
        config = load_config(extra)
        print(f"[{name}] starting vllm serve ...", flush=True)
        log = self._out / f"{name.replace(', ', '-').replace(' ', '-')}.log"
        arguments = _arguments(self._dtype, None if name == RECOMPUTE else extra)
        began = time.monotonic()
        with serve(model, arguments, log) as server:
            if not self._chats:
                self._choose(server, time.monotonic() - began)
            run = hold(server, self._chats, self._answers.get(RECOMPUTE), name, documents.SYSTEM)
        lengths = [turn.prompt_tokens for turn in run.turns]
        self._contexts = (min(lengths), max(lengths))
        self._answers[name] = run.answers
        self._reports[name] = summarise(
            run,
            self._answers[RECOMPUTE],
            len(self._chats),
            config.window,
            config.chunk_tokens,
            config.memory_capacity,
            BYTES[self._dtype],
        )

    def _choose(self, server: Server, start: float) -> None:
        """As many conversations as all runs can hold in time. start: seconds of this server's."""
        first_turn = pace.first_turn_seconds(server)
        count = pace.affordable(first_turn, start, self._turns)
        self._chats = documents.chats(count, self._turns)
        seconds = pace.expected_seconds(count, first_turn, start, self._turns)
        print(
            f"{count} conversations (--chats for another number): a first turn takes "
            f"{first_turn:.1f} s here, all runs some {math.ceil(seconds / 60)} minutes",
            flush=True,
        )

    def _sample(self) -> dict[str, Any]:
        return {
            "page": documents.TOPICS[SAMPLE_CHAT].page,
            "question": self._chats[SAMPLE_CHAT][-1],
            "answers": {name: self._answers[name][SAMPLE_CHAT][-1] for name in SAMPLE_RUNS},
        }

    def _took(self, phase: str, started: float) -> float:
        now = time.monotonic()
        self._seconds[phase] = now - started
        return now


def _extra(name: str, artifact: Path, budget: int | str) -> dict[str, object]:
    """The connector's configuration in a run; that of `RECOMPUTE` is only used to count.

    Without the gate and the encoder's limit: on two CPU cores a small model's prefill may well
    be faster than decoding, and little dearer than encoding.
    """
    preset = name if name.startswith("kvtc") else "raw"
    extra: dict[str, object] = {
        "preset": preset,
        "memory_bytes": budget,
        "load_gate": False,
        "encode_share": 1,
    }
    if preset != "raw":
        extra["artifact"] = str(artifact)
    return extra


def _budget(raw_bytes: int) -> int:
    return -(-raw_bytes // (BUDGET_SHARE * BUDGET_UNIT)) * BUDGET_UNIT


def _arguments(dtype: str, extra: dict[str, object] | None) -> list[str]:
    arguments = [
        *("--dtype", dtype),
        *("--block-size", str(BLOCK_SIZE)),
        *("--max-model-len", str(MAX_MODEL_LEN)),
        *("--num-gpu-blocks-override", str(GPU_BLOCKS)),
        *("--max-num-seqs", "4"),
        "--enforce-eager",
    ]
    if extra is not None:
        arguments += ["--kv-transfer-config", json.dumps(kv_transfer_config(extra))]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
