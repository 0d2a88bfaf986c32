"""Time to first token of a return against recompute, by length of the prompt.

    python -m benchmarks.serving [--model DIR] [--artifact DIR] [--out build/serving.json]

Four servers live at once: one without offload, which computes a prompt again; one with `raw`; one
each with codec 2 at 16x and 32x. Per length, all get the same prompt once and store it. Then, in
every round and in turns, vLLM's own cache is dropped and the prompt comes back with 64 new tokens
at its end. Counters must tell that all of it but the last 128 tokens came from the tier, or nothing
where there is none. A round's figure is the time over that of recomputing in the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec

from benchmarks.demo.artifact import describe, find_or_calibrate
from benchmarks.demo.server import Server, end_on_sigterm, serve
from benchmarks.models import ModelError, smollm2
from benchmarks.models.served_dtype import served_dtype
from benchmarks.serving.measure import Row, measure, table
from benchmarks.serving.prompts import NEW_TOKENS, prompts
from kvtc_vllm.artifact.registry import user_registry
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.config import kv_transfer_config, load_config

ROOT = Path(__file__).resolve().parents[2]
RECOMPUTE = "recompute"
ROWS = (RECOMPUTE, "raw", "kvtc2-16x", "kvtc2-32x")
CODEC, RATIOS = "kvtc2", (16.0, 32.0)
LENGTHS = (1024, 2048, 4096, 7168)
BLOCK_SIZE = 32
ROUNDS = 5


def main() -> int:
    """Measure, print a table, write JSON; exit status 0 if all counters agree."""
    parser = argparse.ArgumentParser(prog="benchmarks.serving", description=__doc__)
    parser.add_argument("--model", type=Path, help="directory to serve (default: SmolLM2 135M)")
    parser.add_argument("--artifact", type=Path, help="default: that of `make demo`")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens per prompt")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="after one that is not counted")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "serving.json")
    args = parser.parse_args()
    end_on_sigterm()
    try:
        lengths = parse_lengths(args.lengths)
        if args.rounds < 1:
            raise ValueError(f"--rounds {args.rounds}: give a number of at least 1")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        run(args.model, args.artifact, lengths, args.rounds, args.out)
    except (ArtifactError, ModelError, RuntimeError, ValueError) as error:
        print(f"serving: {error}", file=sys.stderr)
        return 1
    return 0


def parse_lengths(text: str) -> list[int]:
    """The lengths that `--lengths` gives. Raises ValueError."""
    parts = text.split(",")
    if not all(part.isdigit() and int(part) >= 2 * BLOCK_SIZE + NEW_TOKENS for part in parts):
        raise ValueError(
            f"--lengths {text!r}: give numbers of at least {2 * BLOCK_SIZE + NEW_TOKENS}, such as "
            "1024,2048"
        )
    return [int(part) for part in parts]


def expected_reload(name: str, length: int) -> int:
    """Tokens that a return of `length` finds: whole chunks of its past, outside the window."""
    config = load_config({"preset": name})
    stored = (length - NEW_TOKENS) // config.chunk_tokens * config.chunk_tokens
    outside = (length - config.window) // BLOCK_SIZE * BLOCK_SIZE
    return min(stored, outside)


def run(
    model: Path | None, artifact: Path | None, lengths: Sequence[int], rounds: int, out: Path
) -> None:
    """Serve, measure, print, write. Raises RuntimeError if a server fails or counters disagree."""
    load = os.getloadavg()[0]
    model = (model or smollm2()).absolute()
    dtype = served_dtype()
    with tempfile.TemporaryDirectory(prefix="kvtc-serving-") as directory:
        logs = Path(directory)
        if artifact is None:
            artifact = find_or_calibrate(
                model, CODEC, RATIOS, dtype, user_registry(), logs / "calibration.log"
            )
        asked = prompts(model, lengths, 1 + rounds)
        expected = [expected_reload("kvtc2-16x", length) for length in lengths]
        if expected != [expected_reload("raw", length) for length in lengths]:
            raise ValueError("--lengths: give multiples of 128, so that all rows reload as much")
        with contextlib.ExitStack() as stack:
            servers: dict[str, Server] = {}
            for name in ROWS:
                print(f"[{name}] starting vllm serve ...", flush=True)
                servers[name] = stack.enter_context(
                    serve(
                        model,
                        _arguments(name, artifact, dtype, max(lengths)),
                        logs / f"{name}.log",
                        {"VLLM_SERVER_DEV_MODE": "1"},
                    )
                )
            rows: list[Row] = []
            for row in measure(servers, RECOMPUTE, asked, expected):
                rows.append(row)
                print(table([row]).splitlines()[-1], flush=True)
    print("\n" + table(rows))
    content = {
        "command": "python -m benchmarks.serving",
        "model": model.name,
        "dtype": dtype,
        "artifact": describe(artifact),
        "new_tokens": NEW_TOKENS,
        "rounds": rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("kvtc-vllm", "vllm", "torch")},
        },
        "rows": msgspec.to_builtins(rows),
    }
    out.write_text(json.dumps(content, indent=1) + "\n")


def _arguments(name: str, artifact: Path, dtype: str, longest: int) -> list[str]:
    most = longest + BLOCK_SIZE
    arguments = [
        *("--dtype", dtype, "--block-size", str(BLOCK_SIZE), "--max-model-len", str(most)),
        *("--num-gpu-blocks-override", str(most // BLOCK_SIZE + 4)),
        *("--max-num-seqs", "4", "--enforce-eager"),
    ]
    if name != RECOMPUTE:
        # Without the gate: what is slower to load than to compute has to be seen.
        extra: dict[str, object] = {"preset": name, "memory_bytes": "8GiB", "load_gate": False}
        if name.startswith("kvtc"):
            extra["artifact"] = str(artifact)
        arguments += ["--kv-transfer-config", json.dumps(kv_transfer_config(extra))]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
