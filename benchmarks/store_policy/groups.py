"""Hit rates of store policies for a model with windows, on vLLM's own manager of blocks.

    python -m benchmarks.store_policy.groups [--out benchmarks/results/store_policy_groups.json]

Users come back in random order; each turn of a conversation adds a chunk, up to eight. Full
attention in one block table, a window of 96 tokens in two (`tests/hybrid/pool_engine.py`). A cell
has the share of prompt tokens found in the second half of the trace, in the engine's cache or in
memory, and the records encoded in all of it. "records alone" is on_evict without the rule that what
is left of a prefix is stored with the first part that goes.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from tests.hybrid.pool_engine import CHUNK, PoolEngine, make_request, scheduler_side

ROOT = Path(__file__).resolve().parents[2]
REQUESTS = 400
TURNS = 8
BLOCKS = 640
RECORDS = 220
USERS = (8, 24, 60)
POLICIES = ("eager", "records alone", "on_evict", "auto", "auto exclusive")


def engine(policy: str) -> PoolEngine:
    """With a cache for some 14 conversations, and memory for some 20."""
    alone = policy == "records alone"
    extra = {"exclusive": True} if policy.endswith("exclusive") else {}
    side: Any = scheduler_side("on_evict" if alone else policy.split()[0], RECORDS, **extra)
    if alone:
        side._stores._policy._inner._whole = 0  # before the engine's blocks are bound
    return PoolEngine(side, BLOCKS)


def run(policy: str, users: int) -> dict[str, float]:
    """One trace, the same for every policy."""
    chance, running = random.Random(users), engine(policy)
    turns = [0] * users
    found = asked = 0
    for number in range(REQUESTS):
        user = chance.randrange(users)
        turns[user] += 1
        life, turn = divmod(turns[user] - 1, TURNS)
        words = random.Random(f"{user} {life}")
        tokens = [words.randrange(1000) for _ in range(TURNS * CHUNK)][: (turn + 1) * CHUNK]
        hit = running.ask(make_request(f"r{number}", [*tokens, user]))
        if number >= REQUESTS // 2:
            found, asked = found + hit, asked + len(tokens) + 1
    assert running.wrong == []
    return {"found_percent": round(100 * found / asked, 1), "encoded_records": running.encoded}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "store_policy_groups.json"
    )
    args = parser.parse_args()
    results: dict[str, Any] = {
        "command": "python -m benchmarks.store_policy.groups",
        "requests": REQUESTS,
        "blocks": BLOCKS,
        "records_in_memory": RECORDS,
        "users": {},
    }
    for users in USERS:
        results["users"][str(users)] = {policy: run(policy, users) for policy in POLICIES}
        print(users, json.dumps(results["users"][str(users)]), flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
