"""What halving cold chunks before evicting any brings: hits, and how whole the chunks are then.

    python -m benchmarks.step_eviction [--out benchmarks/results/step_eviction.json]

Traces, engine and sizes are those of `benchmarks.store_policy`: the scheduler's side is the real
one, and there is no model. Halving takes half of a chunk's bytes and a step; chunks are halved
twice at most. *hits* are tokens of prompts that the GPU's own cache or memory had, in the second
half of a trace; *whole*, *once* and *twice* are shares of the chunks that were loaded in all of it.
The last column is what `degrade: off` finds with a memory of three times the bytes.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.store_policy.__main__ import (
    GPU_CHUNKS,
    LEAST_REQUESTS,
    RAW_BYTES,
    REQUESTS_PER_CHUNK,
    TIER_CHUNKS,
    build_of,
    count_hits,
)
from benchmarks.store_policy.engine import SimEngine, _Planned
from benchmarks.store_policy.traces import TRACES
from kvtc_vllm.offload.messages import Halved, WorkerReport
from kvtc_vllm.tiers.keys import RecordKey

OUT = Path(__file__).parent / "results" / "step_eviction.json"
SIZES = (0.5, 1, 2, 4, 8)
MOST_TIMES = 2
LARGER = 3
RATIO = 16


class HalvingEngine(SimEngine):
    """Its worker halves chunks at the end of a step. loaded: chunks, by how often halved."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.times: dict[RecordKey, int] = {}
        self.loaded: Counter[int] = Counter()

    def _run(self, planned: _Planned) -> None:
        step = planned.metadata
        for key in step.evict:
            self.times.pop(key, None)
        for job in step.loads:
            self.loaded.update(self.times.get(item.key, 0) for item in job.items)
        super()._run(planned)
        report = WorkerReport(step.epoch)
        for key in step.halve:
            times, size = MOST_TIMES, None
            if key in self.memory:
                times = self.times[key] = min(MOST_TIMES, self.times.get(key, 0) + 1)
                size = self._record_bytes >> times
            report.halved.append(Halved(key, 0, times, times == MOST_TIMES, size))
        if step.halve:
            self.side.apply_report(report, set())


def main() -> None:
    """Run all, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.step_eviction", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for trace in TRACES:
        for size in SIZES:
            runs = [measure(trace, size, seed) for seed in range(args.seeds)]
            mean = {n: round(sum(run[n] for run in runs) / len(runs), 4) for n in runs[0]}
            rows.append({"trace": trace, "working_set": size, **mean})
            print(*(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    command = f"python -m benchmarks.step_eviction --seeds {args.seeds}"
    args.out.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


def measure(trace: str, size: float, seed: int) -> dict[str, float]:
    """The same requests with a memory that evicts, one that halves before, and a larger one."""
    chunks = round(size * (GPU_CHUNKS + TIER_CHUNKS))
    requests = max(LEAST_REQUESTS, round(chunks * REQUESTS_PER_CHUNK))

    def hits(**keys: Any) -> tuple[HalvingEngine, float]:
        engine, _, _ = build_of(HalvingEngine, {"codec": "kvtc2", **keys})
        source = TRACES[trace](chunks, requests, seed)
        return engine, count_hits(engine, source, requests // 2)["hit_share"]

    engine, halved = hits(degrade="memory")
    loaded = [engine.loaded[times] for times in range(MOST_TIMES + 1)]
    shares = [number / max(1, sum(loaded)) for number in loaded]
    more = LARGER * TIER_CHUNKS * RAW_BYTES // RATIO
    return {
        "hits_off": hits()[1],
        "hits_halving": halved,
        "whole": shares[0],
        "once": shares[1],
        "twice": shares[2],
        "hits_off_larger": hits(memory_bytes=more)[1],
    }


if __name__ == "__main__":
    main()
