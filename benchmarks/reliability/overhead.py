"""What the connector costs where it can't help: throughput with it over throughput without.

    python -m benchmarks.reliability.overhead [--model DIR] [--rounds 7]

All engines live at once and take turns in alternating order, so that what else the machine does
meets them alike; a round's figure is the ratio to the engine without a connector in the same
round. Two workloads: prompts that never come back, of which every chunk is stored in vain, and a
few prompts that stay in vLLM's own cache. A round is several batches without a pause, during
which the encoder never runs out of work; what it still has to do afterwards is done before the
next engine's turn, and in nobody's time. Writes overhead.json beside itself.

`--before TREE` adds the same connectors of another checkout, one with this same script, as
"memory, before" and so on, and each ratio of ours to its older self.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.demo.server import ENVIRONMENT
from kvtc_vllm.config import KVTCConfig

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = ROOT / "tests" / "reference_model" / "model"
BASE = "no connector"
BEFORE = ", before"
WARM_UP_ROUNDS = 2
PROMPT_TOKENS, OUTPUT_TOKENS, PROMPTS = 640, 16, 16
VOCABULARY = 2000
WORKLOADS = ("never reused", "fits the GPU cache")
BATCHES = 2
"""Of one round."""
ROUNDS = {WORKLOADS[0]: 1, WORKLOADS[1]: 4}
"""By how much to multiply the rounds: a short one says little."""

DEFAULTS = {"encode_share": KVTCConfig().encode_share, "load_gate": True}
"""Of the connector, which the tests' engines change."""


def variants(directory: str) -> dict[str, dict[str, Any] | None]:
    """Engines by name: their connector's configuration."""
    memory = {"preset": "kvtc-16x", "memory_bytes": "256MiB", **DEFAULTS}
    disk = {**memory, "disk_path": directory, "disk_min_free": 0, "disk_bytes": "1GiB"}
    return {
        BASE: None,
        "memory": memory,
        "memory and disk": disk,
    }


class Engine:
    """An engine in a process of its own, of the checkout `tree`."""

    def __init__(self, model: Path, extra: dict[str, Any] | None, tree: Path = ROOT) -> None:
        command = [sys.executable, "-m", "benchmarks.reliability.overhead", "--model", str(model)]
        self._process = subprocess.Popen(
            [*command, "--child", json.dumps(extra)],
            cwd=tree,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def wait_until_ready(self) -> None:
        """Raises RuntimeError if it ends instead."""
        self._answer()

    def run(self, workload: str, number: int) -> float:
        """Tokens a second in one round."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([workload, number]) + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def counters(self) -> dict[str, float]:
        """How much was stored."""
        assert self._process.stdin is not None
        self._process.stdin.write("counters\n")
        self._process.stdin.flush()
        return dict(self._answer())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"the engine ended with status {self._process.wait()}")


def serve(model: Path, extra: dict[str, Any] | None) -> None:
    """The child: a round for every line of its input."""
    from tests.connector.engine import engine, metrics

    options = {"num_gpu_blocks_override": 768, "max_num_seqs": PROMPTS, "dtype": "auto"}
    with engine(model, extra, **options) as llm:
        print("@0", flush=True)
        for line in sys.stdin:
            if line.strip() == "counters":
                kept = ("kvtc_stored_chunks", "kvtc_dropped_stores/staging_full")
                print(f"@{json.dumps({n: metrics(llm).get(n, 0) for n in kept})}", flush=True)
                continue
            workload, number = json.loads(line)
            print(f"@{one_round(llm, workload, number)}", flush=True)


def one_round(llm: Any, workload: str, number: int) -> float:
    """Tokens a second over the batches of a round."""
    from vllm import SamplingParams

    from tests.connector.engine import drain

    settings = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    seconds = 0.0
    for batch in range(BATCHES):
        chance = random.Random(number * 100 + batch if workload == WORKLOADS[0] else -1)
        prompts = [
            {"prompt_token_ids": [chance.randrange(10, VOCABULARY) for _ in range(PROMPT_TOKENS)]}
            for _ in range(PROMPTS)
        ]
        began = time.perf_counter()
        llm.generate(prompts, settings, use_tqdm=False)
        seconds += time.perf_counter() - began
    drain(llm)
    return BATCHES * PROMPTS * (PROMPT_TOKENS + OUTPUT_TOKENS) / seconds


def measure(engines: dict[str, Engine], rounds: int) -> dict[str, Any]:
    """Every workload in every engine, `rounds` times in alternating order."""
    results: dict[str, Any] = {}
    for workload in WORKLOADS:
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(WARM_UP_ROUNDS + rounds * ROUNDS[workload]):
            names = list(engines)
            shift = number // 2 % len(names)
            names = names[shift:] + names[:shift]
            for name in names if number % 2 else reversed(names):
                rates[name].append(engines[name].run(workload, number))
        kept = {name: values[WARM_UP_ROUNDS:] for name, values in rates.items()}
        results[workload] = {name: summary(values, kept[BASE]) for name, values in kept.items()}
        for name, values in kept.items():
            if name + BEFORE in kept:
                ratio = summary(values, kept[name + BEFORE])
                del ratio["tokens_per_second"]
                results[workload][f"{name}: now over before"] = ratio
    return results


def summary(rates: list[float], base: list[float]) -> dict[str, Any]:
    """Median rate, and the ratio to another engine, round by round, with its spread."""
    ratios = sorted(ours / theirs for ours, theirs in zip(rates, base, strict=True))
    return {
        "tokens_per_second": round(statistics.median(rates), 1),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_least": round(ratios[0], 4),
        "ratio_most": round(ratios[-1], 4),
        "rounds": len(rates),
    }


def commit(tree: Path) -> str:
    """What is checked out there."""
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measure and write overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "overhead.json")
    parser.add_argument("--before", type=Path, metavar="TREE", help="another checkout")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        serve(args.model, json.loads(args.child))
        return
    with tempfile.TemporaryDirectory(prefix="kvtc-overhead-") as directory:
        load = os.getloadavg()
        engines = {}
        for name, extra in variants(f"{directory}/now").items():
            engines[name] = Engine(args.model, extra)
        if args.before:
            for name, extra in variants(f"{directory}/before").items():
                if extra is not None:
                    engines[name + BEFORE] = Engine(args.model, extra, args.before.resolve())
        for engine in engines.values():
            engine.wait_until_ready()
        results = measure(engines, args.rounds)
        counters = {name: engines[name].counters() for name in engines if name != BASE}
        for engine in engines.values():
            engine.close()
    report = {
        "command": f"python -m benchmarks.reliability.overhead --rounds {args.rounds}"
        + (" --before TREE" if args.before else ""),
        "commits": {
            label: commit(tree)
            for label, tree in (("now", ROOT), ("before", args.before))
            if tree is not None
        },
        "model": args.model.name if args.model != MODEL else "tests/reference_model/model",
        "batch": f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens, {OUTPUT_TOKENS} generated",
        "batches_a_round": BATCHES,
        "cpus": os.cpu_count(),
        "load_average": {"before": load, "after": os.getloadavg()},
        "results": results,
        "counters": counters,
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
