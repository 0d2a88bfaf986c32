"""Clients that hold conversations with an engine in this process, without thinking time."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from tests.connector.engine import drain


@dataclass(frozen=True)
class Load:
    """What the clients say, in random tokens.

    conversations: all of them wait for an answer at any time. context_tokens: of the first turn.
    question_tokens, answer_tokens: of each of the `returns` turns after it.
    """

    conversations: int
    context_tokens: int
    question_tokens: int
    answer_tokens: int
    returns: int
    vocabulary: int


@dataclass
class Turn:
    """One request: prompt tokens, seconds to the first token and to the last."""

    prompt_tokens: int
    ttft: float
    latency: float


@dataclass
class _Client:
    """One conversation. tokens: so far. left: turns to take. sent, first: times of this turn's."""

    tokens: list[int]
    left: int = 1
    sent: float = 0.0
    first: float | None = None
    turns: list[Turn] = field(default_factory=list)


def hold(llm: Any, load: Load, seed: int) -> dict[str, Any]:
    """Figures of the returning turns; the first turns fill the tier before.

    Starts with empty caches. Counters are read when the tier has nothing left to do: of loads over
    the returning turns, of stores over all turns.
    """
    from vllm import SamplingParams

    drain(llm)
    assert llm.reset_prefix_cache(reset_connector=True)
    chance = random.Random(seed)
    settings = SamplingParams(
        temperature=0, max_tokens=load.answer_tokens, ignore_eos=True, detokenize=False
    )
    clients = [
        _Client(_words(chance, load.context_tokens, load.vocabulary))
        for _ in range(load.conversations)
    ]
    start = counters()
    began = time.perf_counter()
    _serve(llm, clients, settings, load, chance)
    fill_seconds = time.perf_counter() - began
    drain(llm)
    before = counters()
    first = [client.turns.pop() for client in clients]
    for client in clients:
        client.left = load.returns
        client.tokens += _words(chance, load.question_tokens, load.vocabulary)
    began = time.perf_counter()
    _serve(llm, clients, settings, load, chance)
    seconds = time.perf_counter() - began
    drain(llm)
    turns = [turn for client in clients for turn in client.turns]
    after = counters()
    return {
        "conversations": load.conversations,
        "context_tokens": load.context_tokens,
        "fill_s": round(fill_seconds, 3),
        "fill_ttft_mean_s": round(statistics.fmean(turn.ttft for turn in first), 4),
        "seconds": round(seconds, 3),
        "ttft_mean_s": round(statistics.fmean(turn.ttft for turn in turns), 4),
        "ttft_p95_s": round(_p95([turn.ttft for turn in turns]), 4),
        "latency_mean_s": round(statistics.fmean(turn.latency for turn in turns), 4),
        "turns_per_s": round(len(turns) / seconds, 3),
        "answer_tokens_per_s": round(len(turns) * load.answer_tokens / seconds, 2),
        **prompt_sources(before, after, sum(turn.prompt_tokens for turn in turns)),
        **tier_counters(start, before, after),
    }


def counters() -> dict[str, float]:
    """vLLM's counters and gauges by name, "name/reason" for those with a reason.

    Unlike `LLM.get_metrics`, with the fractions of seconds.
    """
    from prometheus_client import REGISTRY

    values: dict[str, float] = {}
    for family in REGISTRY.collect():
        if family.type not in ("counter", "gauge") or not family.name.startswith("vllm:"):
            continue
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            name = family.name.removeprefix("vllm:")
            reason = sample.labels.get("reason")
            name = f"{name}/{reason}" if name.startswith("kvtc_") and reason else name
            values[name] = values.get(name, 0.0) + sample.value
    return values


def prompt_sources(
    before: dict[str, float], after: dict[str, float], prompt_tokens: int
) -> dict[str, int]:
    """Where prompt tokens came from: vLLM's own cache, the connector, the prefill."""
    cached = round(grown(before, after, "prefix_cache_hits"))
    reloaded = round(grown(before, after, "external_prefix_cache_hits"))
    return {
        "prompt_tokens": prompt_tokens,
        "cached_tokens": cached,
        "reloaded_tokens": reloaded,
        "computed_tokens": prompt_tokens - cached - reloaded,
        "preemptions": round(grown(before, after, "num_preemptions")),
    }


def tier_counters(
    start: dict[str, float], before: dict[str, float], after: dict[str, float]
) -> dict[str, Any]:
    """Our connector's own counters, and whether they agree with vLLM's; empty without it.

    start: of the row; before: of the returning turns. from_tier: every token that vLLM counts as
    reloaded was offered and written into the paged cache by us, and no load failed.
    """
    if "kvtc_tier_capacity_bytes" not in after:
        return {}

    def loads(name: str) -> float:
        return grown(before, after, f"kvtc_{name}")

    def stores(name: str) -> float:
        return grown(start, after, f"kvtc_{name}")

    failed = _reasons(before, after, "kvtc_failed_loads")
    stored = stores("stored_bytes")
    return {
        "from_tier": not failed
        and grown(before, after, "external_prefix_cache_hits") == loads("hit_tokens")
        and loads("loaded_tokens") == loads("hit_tokens") + loads("resumed_hit_tokens"),
        "hit_tokens": round(loads("hit_tokens")),
        "loaded_tokens": round(loads("loaded_tokens")),
        "loaded_bytes": round(loads("loaded_bytes")),
        "failed_loads": failed,
        "gated_tokens": round(loads("gated_tokens")),
        "decode_s": round(loads("decode_seconds"), 4),
        "tier_bytes": round(after["kvtc_tier_used_bytes"]),
        "tier_chunks": round(after.get("kvtc_tier_chunks", 0)),
        "stored_chunks": round(stores("stored_chunks")),
        "stored_ratio": round(stores("stored_raw_bytes") / stored, 3) if stored else None,
        "dropped_stores": _reasons(start, after, "kvtc_dropped_stores"),
        "evicted_chunks": round(stores("evicted_chunks")),
        "encode_s": round(stores("encode_seconds"), 4),
        "gather_s": round(stores("gather_seconds"), 4),
    }


def grown(before: dict[str, float], after: dict[str, float], name: str) -> float:
    """Growth of one counter."""
    return after.get(name, 0.0) - before.get(name, 0.0)


def _reasons(before: dict[str, float], after: dict[str, float], name: str) -> dict[str, int]:
    """Growth by reason, of those that grew."""
    names = [key for key in after if key.startswith(f"{name}/")]
    found = {key.split("/")[1]: round(grown(before, after, key)) for key in names}
    return {reason: count for reason, count in found.items() if count}


def _serve(
    llm: Any, clients: list[_Client], settings: Any, load: Load, chance: random.Random
) -> None:
    """Let every client take the turns that it has left, each as soon as the last is answered."""
    engine = llm.llm_engine
    numbers = itertools.count()
    running: dict[str, _Client] = {}

    def send(client: _Client) -> None:
        name = str(next(numbers))
        client.sent, client.first = time.perf_counter(), None
        engine.add_request(name, {"prompt_token_ids": list(client.tokens)}, settings)
        running[name] = client

    for client in clients:
        send(client)
    while running:
        for output in engine.step():
            client = running[output.request_id]
            answer = output.outputs[0].token_ids
            now = time.perf_counter()
            if client.first is None and len(answer):
                client.first = now
            if not output.finished:
                continue
            assert client.first is not None, "an answer without tokens"
            del running[output.request_id]
            turn = Turn(len(client.tokens), client.first - client.sent, now - client.sent)
            client.turns.append(turn)
            client.tokens += answer
            client.left -= 1
            if client.left:
                client.tokens += _words(chance, load.question_tokens, load.vocabulary)
                send(client)


def _words(chance: random.Random, count: int, vocabulary: int) -> list[int]:
    return [chance.randrange(10, vocabulary) for _ in range(count)]


def _p95(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]
