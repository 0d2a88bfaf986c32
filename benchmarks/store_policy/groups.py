"""Hit rates of store policies for a model with windows, on vLLM's own manager of blocks.

    python -m benchmarks.store_policy.groups [--out benchmarks/results/store_policy_groups.json]

Users come back in random order; each turn of a conversation adds a chunk, up to eight. Full
attention in one block table, a window of 96 tokens in two (`tests/hybrid/pool_engine.py`). A cell
has the share of prompt tokens found in the second half of the trace, in the engine's cache or in
memory, and the records encoded in all of it.
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
CACHES = {"14 conversations": 640, "3 conversations": 160}
"""Blocks of the engine's own cache, by what it holds."""
RECORDS = 220
"""In memory: some 20 conversations."""
USERS = (8, 24, 60)
POLICIES = ("eager", "on_evict", "auto", "auto exclusive")


def engine(policy: str, blocks: int) -> PoolEngine:
    """With so many blocks."""
    extra = {"exclusive": True} if policy.endswith("exclusive") else {}
    side = scheduler_side(policy.split()[0], RECORDS, **extra)
    return PoolEngine(side, blocks)


def run(policy: str, blocks: int, users: int) -> dict[str, float]:
    """One trace, the same for every policy."""
    chance, running = random.Random(users), engine(policy, blocks)
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
    parser.add_argument("--caches", default=",".join(CACHES), help="some of them; others stay")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    results |= {
        "command": "python -m benchmarks.store_policy.groups",
        "requests": REQUESTS,
        "records_in_memory": RECORDS,
    }
    for name in args.caches.split(","):
        of_cache: dict[str, Any] = {"blocks": CACHES[name], "users": {}}
        results.setdefault("caches", {})[name] = of_cache
        for users in USERS:
            found = {policy: run(policy, CACHES[name], users) for policy in POLICIES}
            of_cache["users"][str(users)] = found
            print(name, users, json.dumps(found), flush=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
