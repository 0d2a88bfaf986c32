"""Figures of a load test, under the names that `vllm bench serve` gives them.

Times are milliseconds, as there. Throughputs are over `busy_duration`, the seconds in which at
least one request was with the server: think times and the other server's turns do not count.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from kvtc_vllm.load_test.client import Answer
from kvtc_vllm.load_test.metrics_page import Samples, increase
from kvtc_vllm.load_test.runner import Request

PERCENTILES = (50, 90, 99)
COUNTED = {
    "prompt_tokens": "vllm:prompt_tokens",
    "gpu_hit_tokens": "vllm:prefix_cache_hits",
    "tier_lookup_tokens": "vllm:external_prefix_cache_queries",
    "tier_hit_tokens": "vllm:external_prefix_cache_hits",
    "kvtc_lookup_tokens": "vllm:kvtc_lookup_tokens",
    "kvtc_hit_tokens": "vllm:kvtc_hit_tokens",
    "kvtc_loaded_tokens": "vllm:kvtc_loaded_tokens",
    "kvtc_stored_raw_bytes": "vllm:kvtc_stored_raw_bytes",
    "kvtc_stored_bytes": "vllm:kvtc_stored_bytes",
    "kvtc_evicted_chunks": "vllm:kvtc_evicted_chunks",
}
"""Name of ours, counter on the metrics page. A server need not have any of them."""


def summary(requests: Sequence[Request], place: int) -> dict[str, Any]:
    """Latencies and throughput of the server in this place."""
    asked = [request.answers[place] for request in requests]
    good = [answer for answer in asked if not answer.error]
    first = [r.answers[place] for r in requests if r.turn == 0 and not r.answers[place].error]
    later = [r.answers[place] for r in requests if r.turn and not r.answers[place].error]
    busy = busy_seconds(good)
    prompt, output = (sum(a.prompt_tokens for a in good), sum(a.output_tokens for a in good))
    figures: dict[str, Any] = {
        "completed": len(good),
        "failed": len(asked) - len(good),
        "errors": sorted({answer.error for answer in asked if answer.error})[:5],
        "busy_duration": busy,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(good) / busy if busy else 0.0,
        "output_throughput": output / busy if busy else 0.0,
        "total_token_throughput": (prompt + output) / busy if busy else 0.0,
    }
    figures |= _spread("ttft", [answer.ttft for answer in good])
    figures |= _spread("ttft_first_turn", [answer.ttft for answer in first])
    figures |= _spread("ttft_later_turns", [answer.ttft for answer in later])
    figures |= _spread("tpot", [_tpot(answer) for answer in good if answer.output_tokens > 1])
    figures |= _spread("itl", [gap for answer in good for gap in answer.itl])
    return figures | _spread("e2el", [answer.latency for answer in good])


def counted(before: Samples, after: Samples) -> dict[str, float]:
    """What the server counted meanwhile, and the shares that follow from it."""
    found = {name: increase(before, after, metric) for name, metric in COUNTED.items()}
    figures = {name: value for name, value in found.items() if value is not None}
    prompt = figures.get("prompt_tokens")
    if prompt:
        hits = figures.get("gpu_hit_tokens", 0.0) + figures.get("tier_hit_tokens", 0.0)
        figures["hit_rate"] = hits / prompt
    if figures.get("kvtc_stored_bytes"):
        figures["kvtc_ratio"] = figures["kvtc_stored_raw_bytes"] / figures["kvtc_stored_bytes"]
    return figures


def compared(requests: Sequence[Request]) -> dict[str, Any]:
    """The second server against the first, turn by turn.

    equal_answers: share of turns with the same text. ttft_ratio: geometric mean over turns of the
    second's time to first token over the first's, with its 95 % interval; likewise of later turns
    only.
    """
    pairs = [r for r in requests if not any(answer.error for answer in r.answers)]
    equal = [r.answers[0].text == r.answers[1].text for r in pairs]
    return {
        "turns": len(pairs),
        "equal_answers": statistics.fmean(equal) if equal else 0.0,
        "ttft_ratio": _ratio(pairs),
        "ttft_ratio_later_turns": _ratio([r for r in pairs if r.turn]),
    }


def busy_seconds(answers: Iterable[Answer]) -> float:
    """Length of the union of all requests' intervals."""
    total, until = 0.0, -math.inf
    for begin, end in sorted((a.sent, a.sent + a.latency) for a in answers):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between neighbours, as numpy does it."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _tpot(answer: Answer) -> float:
    return (answer.latency - answer.ttft) / (answer.output_tokens - 1)


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    figures = {
        f"mean_{name}_ms": 1e3 * statistics.fmean(seconds),
        f"median_{name}_ms": 1e3 * statistics.median(seconds),
    }
    return figures | {f"p{p}_{name}_ms": 1e3 * percentile(seconds, p) for p in PERCENTILES}


def _ratio(pairs: Sequence[Request]) -> list[float]:
    """Geometric mean, and both ends of its 95 % interval; empty for fewer than two turns."""
    logs = [math.log(r.answers[1].ttft / r.answers[0].ttft) for r in pairs]
    if len(logs) < 2:
        return []
    mean = statistics.fmean(logs)
    half = 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
    return [math.exp(mean + shift) for shift in (0.0, -half, half)]
