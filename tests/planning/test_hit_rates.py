"""Che's approximation and the simulation against a plain LRU, and against each other."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest

from kvtc_vllm.load_test.traffic import Traffic, zipf_weights
from kvtc_vllm.planning.che import Pace, steady
from kvtc_vllm.planning.lookups import Rules, lengths
from kvtc_vllm.planning.plan import Hardware, plan
from kvtc_vllm.planning.simulation import Fleet, LruTokens, Service, simulate

ALL = Rules(chunk_tokens=16, recent_window=0)


def plain_lru(capacity: int, uses: list[int]) -> float:
    """Hit rate of whole things, with a list and nothing of the code under test."""
    kept: list[int] = []
    hits = 0
    for one in uses:
        if one in kept:
            hits += 1
            kept.remove(one)
        kept.insert(0, one)
        del kept[capacity:]
    return hits / len(uses)


@pytest.mark.parametrize("zipf", [0.6, 0.9, 1.2])
@pytest.mark.parametrize("capacity", [5, 20, 60])
def test_documents_by_zipf_are_hit_as_in_a_plain_lru(zipf: float, capacity: int) -> None:
    """Conversations of one turn: the independent reference model that Che's formula is for."""
    bounds = list(accumulate(zipf_weights(100, zipf)))
    uses = random.Random(3).choices(range(100), cum_weights=bounds, k=30_000)
    direct = plain_lru(capacity, uses)
    traffic = Traffic(
        turns=1,
        documents=100,
        document_tokens=160,
        prefix_tokens=0,
        question_tokens=1,
        answer_tokens=1,
        zipf=zipf,
    )
    found = steady(traffic, ALL, Pace(1.0, 1.0, 0.0), capacity * 160)
    assert found.hit_tokens / 160 == pytest.approx(direct, rel=0.05)


@pytest.mark.parametrize("capacity", [4_000, 12_000, 30_000])
@pytest.mark.parametrize("documents", [0, 30])
def test_conversations_are_hit_as_in_the_simulation(capacity: int, documents: int) -> None:
    """Think times, shared prefixes, histories of their own: closed loop, fast server."""
    traffic = Traffic(
        conversations=3000,
        turns=4,
        think_seconds=10,
        prefixes=2,
        prefix_tokens=64,
        documents=documents,
        document_tokens=320,
        question_tokens=32,
        answer_tokens=48,
    )
    hardware = Hardware(
        kv_bytes_per_token=1,
        gpu_cache_tokens=0,
        memory_bytes=capacity,
        prefill_rate=1e6,
        decode_rate=48,
    )
    direct = simulate(traffic, ALL, Service(1e6, 48), 40, [capacity], skip=500)
    found = plan(traffic, ALL, hardware, 40, 1.0).tiers["memory"]
    assert found.hit_rate == pytest.approx(direct.hit_rate, rel=0.05)
    assert found.turns_per_second == pytest.approx(3000 * 4 / direct.seconds, rel=0.05)


def test_the_simulation_counts_what_a_list_of_chunks_counts() -> None:
    """One user, one turn: chunks in order, nothing shared but the prefix."""
    traffic = Traffic(
        conversations=4,
        turns=1,
        prefix_tokens=32,
        document_tokens=64,
        question_tokens=16,
        answer_tokens=1,
    )
    found = simulate(traffic, ALL, Service(1e9, 1e9), 1, [10_000])
    assert found.prompt_tokens == 4 * 112
    assert found.hit_tokens == [3 * 32, 0]
    # Two caches: the first serves what it has, the second only what lies beyond.
    both = simulate(traffic, ALL, Service(1e9, 1e9), 1, [16, 10_000])
    assert both.hit_tokens == [3 * 16, 3 * 16, 0]


def test_the_tail_of_a_prefix_is_evicted_first() -> None:
    cache = LruTokens(3 * 16, 16)
    cache.use(["a", "b", "c"])
    cache.use(["x"])
    assert cache.found(["a", "b", "c"]) == 2
    assert cache.found(["x"]) == 1


def test_what_may_be_loaded_is_whole_chunks_before_the_recent_window() -> None:
    rules = Rules(chunk_tokens=128, recent_window=100)
    assert [rules.reusable(stored, 1000) for stored in (0, 127, 300, 1000)] == [0, 0, 256, 896]
    assert rules.reusable(896, 950) == 850
    assert rules.reusable(128, 90) == 0


def test_lengths_grow_with_turns_and_template() -> None:
    traffic = Traffic(
        turns=2, prefix_tokens=10, document_tokens=100, question_tokens=5, answer_tokens=7
    )
    found = lengths(traffic, Rules(template_tokens=3))
    assert (found.prefix, found.document) == (13, 113)
    assert found.prompts == (121, 139)
    assert found.stored == (128, 146)


def test_more_capacity_never_lowers_the_hit_rate() -> None:
    traffic = Traffic(documents=20)
    pace = Pace(0.5, 1.0, 5.0)
    rates = [steady(traffic, Rules(), pace, 2.0**n).hit_rate for n in range(8, 24)]
    assert rates == sorted(rates)
    assert rates[0] < 0.1 < 0.6 < rates[-1]


def test_a_fleet_whose_conversations_stay_is_so_many_single_engines() -> None:
    """With a storage that holds all, scattering costs nothing; without one, nearly everything."""
    traffic = Traffic(conversations=400, turns=4, prefix_tokens=0, think_seconds=1)
    service, room = Service(1e6, 50), [1e9]
    single = simulate(traffic, Rules(), service, 40, room).hit_rate
    fleet = Fleet(engines=100)
    assert simulate(traffic, Rules(), service, 40, room, fleet=fleet).hit_rate == single
    apart = simulate(traffic, Rules(), service, 40, room, fleet=Fleet(100, scatter=True))
    assert apart.hit_rate < 0.05
    behind = simulate(traffic, Rules(), service, 40, room, fleet=Fleet(100, 1e9, scatter=True))
    assert behind.hit_rate == single
    assert behind.hit_tokens[-1] > 0.9 * sum(behind.hit_tokens)
