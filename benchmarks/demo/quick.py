"""The demo with our own small stand-in: a minute or two, and nothing to download but vLLM.

    python -m benchmarks.demo.quick

Serves the reference model four times with a paged cache too small for more than
one conversation, and holds a dozen conversations round-robin, so that each
returns to find its blocks evicted: without offload, with uncompressed offload
and with KVTC at 8x and 16x, all under the same byte budget. Writes
build/demo-quick/report.json and report.png beside it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import msgspec

from benchmarks.demo.conversations import Answers, RunReport, hold, summarise
from benchmarks.demo.report import plot, table
from benchmarks.demo.server import end_on_sigterm, serve
from benchmarks.models.served_dtype import BYTES, served_dtype
from kvtc_vllm.config import kv_transfer_config, load_config

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "reference_model" / "model"
BLOCK_SIZE = 32
MAX_MODEL_LEN = 2048
GPU_BLOCKS = MAX_MODEL_LEN // BLOCK_SIZE + 4
"""One conversation of the longest length, and little more."""

RUNS = ("none", "raw", "kvtc-8x", "kvtc-16x")


def main() -> int:
    """Run the demo; exit status 0 if every run's counters agree."""
    parser = argparse.ArgumentParser(prog="benchmarks.demo.quick", description=__doc__)
    parser.add_argument("--chats", type=int, default=12)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--budget", default="12MiB", help="byte budget of every run's tier")
    parser.add_argument("--runs", default=",".join(RUNS), help="none, or names of presets")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "demo-quick")
    args = parser.parse_args()
    end_on_sigterm()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    chats = _chats(args.chats, args.turns)
    dtype = served_dtype()
    reports: dict[str, RunReport] = {}
    reference: Answers | None = None
    for name in args.runs.split(","):
        offload = name != "none"
        # Without the gate and the encoder's limit: on two CPU cores a small model's prefill may
        # well be faster than decoding, and little dearer than encoding.
        extra = {
            "preset": name if offload else "raw",
            "memory_bytes": args.budget,
            "load_gate": False,
            "encode_share": 1,
        }
        config = load_config(extra)
        print(f"[{name}] starting vllm serve ...", flush=True)
        with serve(
            MODEL, _arguments(dtype, extra if offload else None), args.out / f"{name}.log"
        ) as server:
            run = hold(server, chats, reference, name)
        reference = reference or run.answers
        reports[name] = summarise(
            run,
            reference,
            args.chats,
            config.window,
            config.chunk_tokens,
            config.memory_capacity,
            BYTES[dtype],
        )
    seconds = time.monotonic() - started
    baseline = next(iter(reports))
    print("\n" + table(reports, args.chats, baseline))
    _write(args.out, dtype, reports, args.chats, baseline, seconds)
    print(f"\n{args.out / 'report.json'}\n{args.out / 'report.png'}\n{seconds:.0f} s")
    return 0


def _chats(count: int, turns: int) -> list[list[str]]:
    # The data builder is a folder of scripts beside the model, not a package.
    sys.path.insert(0, str(MODEL.parent))
    data = importlib.import_module("data")
    return list(data.conversations(seed=11, n=count, turns=turns))


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


def _write(
    out: Path,
    dtype: str,
    reports: dict[str, RunReport],
    chats: int,
    baseline: str,
    seconds: float,
) -> None:
    content = {
        "dtype": dtype,
        "runs": msgspec.to_builtins(reports),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("kvtc-vllm", "vllm", "torch")},
        },
        "seconds": round(seconds, 1),
    }
    (out / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    plot(reports, chats, baseline, out / "report.png")


if __name__ == "__main__":
    sys.exit(main())
