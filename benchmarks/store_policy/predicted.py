"""What `kvtc plan` predicts for three kinds of traffic, against the connector's own scheduler.

    python -m benchmarks.store_policy.predicted [--out benchmarks/results/plan_traces.json]

Chats: users with a text of their own. Documents: questions about a pool of documents of unequal
popularity. Agents: few long system messages that many runs share, many short turns. Each is
replayed at three sizes through the engine of `benchmarks.store_policy` (GPU of 64 chunks, memory
tier of 192, real scheduler, indexes and store policy `eager`) in the order in which its users
think; hits are counted in the second half. The plan sees the traffic's parameters only: by
`kvtc plan` (Che's approximation, the long run), and by `kvtc plan --simulate`.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.store_policy.__main__ import GPU_CHUNKS, TIER_CHUNKS, build, count_hits
from benchmarks.store_policy.engine import SimRequest
from benchmarks.store_policy.traces import CHUNK, request_of
from kvtc_vllm.load_test.traffic import Traffic, scripts
from kvtc_vllm.planning.lookups import Rules
from kvtc_vllm.planning.plan import Hardware, plan
from kvtc_vllm.planning.simulation import Service, simulate

OUT = Path(__file__).parents[1] / "results" / "plan_traces.json"
DECODE_RATE = 32.0
"""Tokens per second of an answer. Prompts cost no time here: thinking sets the pace."""
PREFILL_RATE = 1e9
CONVERSATIONS = 400
RULES = Rules(chunk_tokens=CHUNK, recent_window=128)

TRAFFIC: dict[str, tuple[Traffic, tuple[int, ...]]] = {
    "chats": (
        Traffic(
            conversations=CONVERSATIONS,
            turns=6,
            think_seconds=30,
            prefix_tokens=0,
            document_tokens=512,
            question_tokens=128,
            answer_tokens=128,
        ),
        (8, 16, 32),
    ),
    "documents": (
        Traffic(
            conversations=CONVERSATIONS,
            turns=2,
            think_seconds=20,
            prefix_tokens=256,
            documents=60,
            document_tokens=1536,
            zipf=1.0,
            question_tokens=64,
            answer_tokens=64,
        ),
        (2, 8, 24),
    ),
    "agents": (
        Traffic(
            conversations=CONVERSATIONS,
            turns=8,
            think_seconds=4,
            prefixes=6,
            prefix_tokens=2048,
            document_tokens=0,
            zipf=0.7,
            question_tokens=192,
            answer_tokens=64,
        ),
        (2, 6, 12),
    ),
}
"""Name -> (traffic, numbers of users at a time)."""


def replay(traffic: Traffic, clients: int) -> Iterator[SimRequest]:
    """All turns in the order of their time."""
    waiting = iter(enumerate(scripts(traffic)))
    events: list[tuple[float, int, int, Any, list[tuple[object, int]]]] = []

    def begin(now: float) -> None:
        if (one := next(waiting, None)) is None:
            return
        number, script = one
        prompt: list[tuple[object, int]] = []
        if traffic.prefix_tokens:
            prompt.append((("prefix", script.prefix), traffic.prefix_tokens))
        if traffic.document_tokens:
            name = ("document", script.document if traffic.documents else ("own", number))
            prompt.append((name, traffic.document_tokens))
        heapq.heappush(events, (now, number, 0, script, prompt))

    for _ in range(clients):
        begin(0.0)
    while events:
        now, number, turn, script, prompt = heapq.heappop(events)
        asked = number * traffic.turns + turn
        prompt = [*prompt, (("question", asked), traffic.question_tokens)]
        yield request_of(asked, prompt, traffic.answer_tokens)
        end = now + traffic.answer_tokens / DECODE_RATE
        if turn + 1 < traffic.turns:
            prompt = [*prompt, (("answer", asked), traffic.answer_tokens)]
            then = end + script.think_seconds[turn + 1]
            heapq.heappush(events, (then, number, turn + 1, script, prompt))
        else:
            begin(end)


def compare(name: str, clients: int) -> dict[str, Any]:
    """Measured and predicted shares of prompt tokens that are not computed."""
    traffic, _ = TRAFFIC[name]
    requests = traffic.conversations * traffic.turns
    engine, _, _ = build({"store_policy": "eager", "recent_window": RULES.recent_window})
    measured = count_hits(engine, replay(traffic, clients), requests // 2)
    planned, simulated = predict(traffic, clients)
    return {
        "traffic": name,
        "clients": clients,
        "measured": round(measured["hit_share"], 4),
        "plan": round(planned, 4),
        "simulate": round(simulated, 4),
    }


def predict(traffic: Traffic, clients: int) -> tuple[float, float]:
    """The same share by `kvtc plan`, and by its simulation."""
    hardware = Hardware(
        kv_bytes_per_token=1,
        gpu_cache_tokens=GPU_CHUNKS * CHUNK,
        memory_bytes=TIER_CHUNKS * CHUNK,
        prefill_rate=PREFILL_RATE,
        decode_rate=DECODE_RATE,
    )
    planned = plan(traffic, RULES, hardware, clients, ratio=1.0).tiers["memory"].hit_rate
    simulated = simulate(
        traffic,
        RULES,
        Service(PREFILL_RATE, DECODE_RATE),
        clients,
        [GPU_CHUNKS * CHUNK, TIER_CHUNKS * CHUNK],
        skip=traffic.conversations // 2,
    ).hit_rate
    return planned, simulated


def main() -> None:
    """Run all, print a line each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = []
    for name, (_, sizes) in TRAFFIC.items():
        for clients in sizes:
            rows.append(compare(name, clients))
            print(rows[-1], flush=True)
    traffic = {name: msgspec.to_builtins(one) for name, (one, _) in TRAFFIC.items()}
    command = "python -m benchmarks.store_policy.predicted"
    args.out.write_text(
        json.dumps({"command": command, "traffic": traffic, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
