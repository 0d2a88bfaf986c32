"""The simulation against what was measured on real engines: by the demo, and by `kvtc bench`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest

from benchmarks.demo.conversations import MAX_ANSWER_TOKENS
from kvtc_vllm.load_test.traffic import Traffic
from kvtc_vllm.planning.lookups import Rules
from kvtc_vllm.planning.simulation import Service, simulate

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
REPORT = json.loads((RESULTS / "demo.json").read_text())
LOAD = json.loads((RESULTS / "load_test.json").read_text())
TURNS = 3
KV_BYTES_PER_TOKEN = 2 * 30 * 3 * 64 * 2
"""SmolLM2-135M: K and V, 30 layers, 3 heads of 64, bfloat16."""


@pytest.mark.parametrize("name", ["raw, with room", "raw", "kvtc2-16x", "kvtc2-32x"])
def test_tokens_that_the_demo_reloaded_are_predicted(name: str) -> None:
    """Of the chats' lengths only the mean is known to the plan. Within 20 %, or 2 % of prompts."""
    run, chats = REPORT["runs"][name], REPORT["conversations"]
    mean_prompt = run["prompt_tokens"] / (chats * TURNS)
    question = 24
    # The middle one of three prompts has one more answer and question than the first.
    document = round(mean_prompt) - 2 * question - MAX_ANSWER_TOKENS
    traffic = Traffic(
        conversations=chats,
        turns=TURNS,
        think_seconds=0,
        prefix_tokens=0,
        document_tokens=document,
        question_tokens=question,
        answer_tokens=MAX_ANSWER_TOKENS,
    )
    capacity = run["budget_bytes"] * run["ratio"] / KV_BYTES_PER_TOKEN
    found = simulate(traffic, Rules(), Service(500, 20), chats, [capacity])
    measured = run["reloaded_tokens"] / run["prompt_tokens"]
    assert found.hit_rate == pytest.approx(measured, rel=0.2, abs=0.02)


@pytest.mark.parametrize("place", [0, 1], ids=["raw", "kvtc-16x"])
def test_hits_that_a_load_test_met_are_predicted(place: int) -> None:
    """By the same traffic, with the engine's own rates and sizes. Both of its caches alike."""
    traffic, engine, server = Traffic(**LOAD["traffic"]), LOAD["engine"], LOAD["servers"][place]
    rows = [r for r in LOAD["requests"] if r["server"] == place and not r["turn"]]
    prompt = median(row["prompt_tokens"] for row in rows)
    words = traffic.prefix_tokens + traffic.document_tokens + traffic.question_tokens
    # A first prompt has two messages.
    rules = Rules(template_tokens=round((prompt - words) / 2))
    prefill = median(1e3 * row["prompt_tokens"] / row["ttft_ms"] for row in rows)
    service = Service(prefill, 1e3 / server["median_itl_ms"])
    metrics = server["metrics"]
    memory = engine["memory_bytes"] * metrics["kvtc_ratio"] / engine["kv_bytes_per_token"]
    capacities = [engine["gpu_cache_tokens"], memory]
    found = simulate(traffic, rules, service, LOAD["clients"], capacities)
    assert found.prompt_tokens == pytest.approx(metrics["prompt_tokens"], rel=0.02)
    assert found.hit_rate == pytest.approx(metrics["hit_rate"], rel=0.2)
    gpu, tier, _ = found.hit_tokens
    assert gpu == pytest.approx(metrics["gpu_hit_tokens"], rel=0.2)
    assert tier == pytest.approx(metrics["tier_hit_tokens"], rel=0.2)


def test_the_page_shows_the_measured_figures() -> None:
    page = (RESULTS.parents[1] / "docs" / "operations.md").read_text()
    raw, kvtc = (server["metrics"] for server in LOAD["servers"])
    assert f"| {100 * raw['hit_rate']:.1f} % | {100 * kvtc['hit_rate']:.1f} % |" in page
    assert f"| {raw['kvtc_ratio']:.2f} | {kvtc['kvtc_ratio']:.2f} |" in page
    ratio, low, high = LOAD["paired"]["ttft_ratio"]
    assert f"{ratio:.2f}, with an interval from {low:.2f} to {high:.2f}" in page
