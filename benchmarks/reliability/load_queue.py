"""Loads that queue: how long requests wait for theirs, against recomputing their own prompt.

    python -m benchmarks.reliability.load_queue [--requests 64] [--out FILE.json]

One engine on the CPU with the reference model and its artifact at 8x. All prompts are in the tier
and in no block of vLLM's, and are asked for at once: first with `load_gate` off, where every
request is loaded, then with it on, as it is by default. A wait is from when a load was ordered
until its request may go on; it is divided by the time to the first token of such a prompt alone
and computed. Above 1 a request would have been served sooner without the tier.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "reference_model" / "model"
TOKENS = 1536
VOCABULARY = 2000


class Bench:
    """One engine. gate: `load_gate`."""

    def __init__(self, gate: bool, requests: int) -> None:
        from tests.connector.engine import engine

        config = {
            "ratio": 8,
            "memory_bytes": "1GiB",
            "load_gate": gate,
            "encode_share": 1,
            "recent_window": 128,
        }
        self._requests = requests
        self._number = 0
        self._engine = engine(
            MODEL,
            config,
            max_model_len=2048,
            max_num_seqs=requests,
            num_gpu_blocks_override=64 * (requests + 4),
        )

    def run(self) -> dict[str, float]:
        """Store, measure a computed prompt alone, then ask for all at once."""
        with self._engine as llm:
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
            prompts = [self._prompt() for _ in range(self._requests)]
            self._ask(llm, prompts)
            self._settle(llm)
            alone = statistics.median(self._ask(llm, [self._prompt()])[0] for _ in range(9))
            # What the policy knows of loads, as it would after some time of service.
            for prompt in prompts[:6]:
                assert llm.reset_prefix_cache()
                self._ask(llm, [prompt])
            assert llm.reset_prefix_cache()
            waits = _watch(scheduler)
            first_tokens = self._ask(llm, prompts)
            ended = [end - begin for begin, end in waits.values() if end]
            return {
                "computed alone, ms": round(1e3 * alone, 1),
                "loads": len(ended),
                "longest wait / computed": round(max(ended, default=0.0) / alone, 2),
                "median wait / computed": round(
                    statistics.median(ended) / alone if ended else 0.0, 2
                ),
                "last first token, ms": round(1e3 * max(first_tokens), 1),
                "mean first token, ms": round(1e3 * statistics.mean(first_tokens), 1),
            }

    def _prompt(self) -> list[int]:
        self._number += 1
        return [(self._number * 7919 + 31 * i) % VOCABULARY + 1 for i in range(TOKENS)]

    def _ask(self, llm: Any, prompts: list[list[int]]) -> list[float]:
        """Seconds to each first token, all asked at once."""
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        began = time.perf_counter()
        for prompt in prompts:
            self._number += 1
            llm.llm_engine.add_request(f"r{self._number}", {"prompt_token_ids": prompt}, settings)
        first: dict[str, float] = {}
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                first.setdefault(output.request_id, time.perf_counter() - began)
        return list(first.values())

    def _settle(self, llm: Any) -> None:
        connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
        while connector.has_pending_push_work():
            llm.llm_engine.step()


def _watch(scheduler: Any) -> dict[str, list[float]]:
    """When each load from now on was ordered and ended, by its request."""
    waits: dict[str, list[float]] = {}
    planned, ended = scheduler._load_policy.load_planned, scheduler._load_policy.load_ended

    def load_planned(request_id: str, tokens: int) -> float:
        waits[request_id] = [time.perf_counter(), 0.0]
        return float(planned(request_id, tokens))

    def load_ended(request_id: str) -> None:
        if request_id in waits:
            waits[request_id][1] = time.perf_counter()
        ended(request_id)

    scheduler._load_policy.load_planned = load_planned
    scheduler._load_policy.load_ended = load_ended
    return waits


def main() -> None:
    """Measure both, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("load_queue.json"))
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    result: dict[str, Any] = {"requests": args.requests, "prompt_tokens": TOKENS}
    for name, gate in (("load_gate off", False), ("load_gate on", True)):
        result[name] = Bench(gate, args.requests).run()
        print(name, result[name], flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
