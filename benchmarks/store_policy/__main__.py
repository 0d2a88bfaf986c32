"""Store policies on four working sets of three traces: hits, and what was encoded for them.

    python -m benchmarks.store_policy [--out benchmarks/results/store_policy.json]

The scheduler's side is the real one, and so are its indexes; the engine is a small one that
allocates, hits, preempts and frees blocks as vLLM does, and runs no model. GPU and memory tier
together hold 256 chunks at 16x: the GPU 64 of them, whose bytes are 4 MiB, and the tier 192, in
768 KiB. A working set of 1x is 256 chunks. Every policy gets the same requests, four at a time.
Hits are counted in the second half of a trace, as tokens of prompts; encoded chunks in all of it.

A fourth trace has bursts: questions about documents, and every 20 requests a prompt that takes the
whole GPU cache in one step. Memory holds half as many chunks as the GPU there, or two, four times
as many, and a disk tier below it all of the working set.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.store_policy.engine import BLOCK, SimEngine
from benchmarks.store_policy.traces import CHUNK, TRACES, Trace, bursts
from kvtc_vllm.config import load_config
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup
from kvtc_vllm.offload.on_evict import BlockReuse
from kvtc_vllm.offload.scheduler import KVTCScheduler

Engine = TypeVar("Engine", bound=SimEngine)
OUT = Path(__file__).parents[1] / "results" / "store_policy.json"
GPU_CHUNKS, TIER_CHUNKS = 64, 192
RAW_BYTES = 1 << 16
RATIO = 16
BATCH, AT_ONCE = 2048, 4
SIZES = (0.5, 1, 2, 8)
REQUESTS_PER_CHUNK = 0.5
"""Of the working set, so that each document is asked about four times on average."""
LEAST_REQUESTS = 400
POLICIES: dict[str, dict[str, Any]] = {
    "raw eager": {"codec": "raw", "store_policy": "eager"},
    "raw on_evict exclusive": {"codec": "raw", "store_policy": "on_evict", "exclusive": True},
    "eager": {"store_policy": "eager"},
    "on_evict": {"store_policy": "on_evict"},
    "on_evict exclusive": {"store_policy": "on_evict", "exclusive": True},
    "auto": {"store_policy": "auto"},
    "auto exclusive": {"store_policy": "auto", "exclusive": True},
}


BURST_POLICIES = ("eager", "on_evict", "auto")
BURST_WORKING_SET = 2
BURST_MEMORIES = (GPU_CHUNKS // 2, 2 * GPU_CHUNKS, 4 * GPU_CHUNKS)
DISK: dict[str, Any] = {"disk_path": "/not/used", "disk_bytes": "1GiB"}


def main() -> None:
    """Run all, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.store_policy", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    rows = []
    for trace in TRACES:
        for size in SIZES:
            print(f"\n{trace}, working set {size}x of GPU and tier", flush=True)
            for policy in POLICIES:
                runs = [measure(trace, size, policy, seed) for seed in range(args.seeds)]
                row = {"trace": trace, "working_set": size, "policy": policy, **_mean(runs)}
                rows.append(row)
                print(
                    f"  {policy:24} hits {row['hit_share']:6.1%} (GPU {row['gpu_share']:6.1%}) "
                    f"encoded {row['encoded_chunks']:7.0f} again {row['reencoded_chunks']:5.0f} "
                    f"late {row['late_chunks']:5.0f} lost {row['lost_chunks']:3.0f}",
                    flush=True,
                )
    for memory in BURST_MEMORIES:
        print(f"\nbursts, memory of {memory} chunks and a disk", flush=True)
        for policy in BURST_POLICIES:
            runs = [measure_bursts(memory, policy, seed) for seed in range(args.seeds)]
            row = {"trace": "bursts", "memory_chunks": memory, "policy": policy, **_mean(runs)}
            rows.append(row)
            print(
                f"  {policy:24} hits {row['hit_share']:6.1%} encoded {row['encoded_chunks']:7.0f} "
                f"without room {row['no_room_chunks']:5.0f}",
                flush=True,
            )
    command = f"python -m benchmarks.store_policy --seeds {args.seeds}"
    args.out.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


def measure(trace: str, size: float, policy: str, seed: int) -> dict[str, float]:
    """One run. Shares are of the prompts' tokens."""
    chunks = round(size * (GPU_CHUNKS + TIER_CHUNKS))
    requests = max(LEAST_REQUESTS, round(chunks * REQUESTS_PER_CHUNK))
    engine, side, record = build(POLICIES[policy])
    source = TRACES[trace](chunks, requests, seed)
    started = time.process_time()
    shares = count_hits(engine, source, requests // 2)
    stats = side.take_stats()
    counted = {} if stats is None else stats.data
    return {
        "requests": requests,
        **shares,
        "encoded_chunks": engine.totals.encoded_records,
        "encoded_bytes": engine.totals.encoded_records * record,
        "reencoded_chunks": counted.get("reencoded_chunks", 0),
        "late_chunks": counted.get("late_stores", 0),
        "lost_chunks": counted.get("dropped_stores/overwritten", 0),
        "preemptions": engine.totals.preemptions,
        "cpu_seconds": time.process_time() - started,
    }


def measure_bursts(memory: int, policy: str, seed: int) -> dict[str, float]:
    """One run of the trace with bursts. Chunks without room are lost."""
    chunks = BURST_WORKING_SET * (GPU_CHUNKS + TIER_CHUNKS)
    keys = {"memory_bytes": memory * RAW_BYTES // RATIO, **DISK, **POLICIES[policy]}
    engine, side, _ = build(keys, batch=GPU_CHUNKS * CHUNK)
    source = bursts(chunks, LEAST_REQUESTS, seed, GPU_CHUNKS - 4)
    shares = count_hits(engine, source, LEAST_REQUESTS // 2)
    stats = side.take_stats()
    counted = {} if stats is None else stats.data
    return {
        **shares,
        "encoded_chunks": engine.totals.encoded_records,
        "no_room_chunks": counted.get("dropped_stores/tier_full", 0),
        "lost_chunks": counted.get("dropped_stores/overwritten", 0),
    }


def build(keys: dict[str, Any], batch: int = BATCH) -> tuple[SimEngine, KVTCScheduler, int]:
    """An engine with GPU and tier of the sizes above, its scheduler side, bytes of a record.

    keys: of the configuration. batch: most tokens in a step.
    """
    return build_of(SimEngine, keys, batch)


def build_of(
    kind: type[Engine], keys: dict[str, Any], batch: int = BATCH
) -> tuple[Engine, KVTCScheduler, int]:
    """As `build`, of a kind of engine."""
    record = RAW_BYTES if keys.get("codec") == "raw" else RAW_BYTES // RATIO
    config = load_config(
        {
            "memory_bytes": TIER_CHUNKS * RAW_BYTES // RATIO,
            "chunk_tokens": CHUNK,
            "load_gate": False,
            **keys,
        }
    )
    group = CacheGroup(("layers.0",), BLOCK, 1, 128, 128, torch.bfloat16)
    reuse = BlockReuse(batch // BLOCK + AT_ONCE)
    side = KVTCScheduler(
        config, CacheGeometry((group,), 1), [record], prompt_only=False, reuse=reuse
    )
    blocks = GPU_CHUNKS * CHUNK // BLOCK + 1
    return kind(side, blocks, record, batch=batch, requests=AT_ONCE), side, record


def count_hits(engine: SimEngine, source: Trace, warm: int) -> dict[str, float]:
    """Serve all requests; shares of the prompts' tokens after the first `warm` requests."""
    _serve(engine, islice(source, warm))
    before = engine.totals.prompt_tokens, engine.totals.engine_hit_tokens, _loaded(engine)
    _serve(engine, source)
    assert not engine.wrong
    prompt = engine.totals.prompt_tokens - before[0]
    gpu = engine.totals.engine_hit_tokens - before[1]
    loaded = _loaded(engine) - before[2]
    return {"hit_share": (gpu + loaded) / prompt, "gpu_share": gpu / prompt}


def _loaded(engine: SimEngine) -> int:
    return engine.totals.loaded_tokens


def _serve(engine: SimEngine, requests: Trace) -> None:
    """So many at a time, until all have ended."""
    for request in requests:
        while len(engine.waiting) + len(engine.running) + engine.loads >= AT_ONCE:
            engine.step()
        engine.add(request)
    engine.drain()


def _mean(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(run[name] for run in runs) / len(runs), 4) for name in runs[0]}


if __name__ == "__main__":
    main()
