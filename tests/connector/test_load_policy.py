"""Load or recompute, from rates that are fed in."""

from __future__ import annotations

import pytest

from kvtc_vllm.offload.load_policy import MIN_SAMPLES, PROBE_EVERY, UNPROVEN_LOADS, LoadPolicy


def fed(
    load: float, prefill: float, samples: int = MIN_SAMPLES, enabled: bool = True
) -> LoadPolicy:
    """A gate that saw these seconds for a thousand tokens."""
    gate = LoadPolicy(enabled)
    for _ in range(samples):
        gate.observe_load(1000, load)
        gate.observe_step(1000, prefill)
    return gate


def test_the_faster_way_is_taken() -> None:
    assert fed(load=0.1, prefill=0.2).admits(1000)
    assert not fed(load=0.2, prefill=0.1).admits(1000)
    assert fed(load=0.1, prefill=0.1).admits(1000)


def test_it_offers_all_while_it_knows_little_or_is_off() -> None:
    assert fed(load=0.2, prefill=0.1, samples=MIN_SAMPLES - 1).admits(1000)
    assert fed(load=0.2, prefill=0.1, enabled=False).admits(1000)
    only_loads = LoadPolicy(True)
    for _ in range(99):
        only_loads.observe_load(1, 99)
    assert only_loads.admits(1000)


def test_a_load_waits_for_those_before_it() -> None:
    gate = fed(load=0.1, prefill=0.35)
    for number in range(9):
        assert gate.admits(1000) == (number < 3)
        if number < 3:
            assert gate.load_planned(str(number), 1000) == pytest.approx(0.35)
    gate.load_ended("0")
    gate.load_ended("0")
    assert gate.admits(1000)


def test_a_long_request_may_wait_longer() -> None:
    gate = fed(load=0.1, prefill=0.2)
    gate.load_planned("before", 3000)
    assert not gate.admits(2000)
    assert gate.admits(3000)


def test_no_queue_builds_up_before_anything_is_known() -> None:
    gate = LoadPolicy(True)
    for number in range(UNPROVEN_LOADS):
        assert gate.admits(1000)
        assert gate.load_planned(str(number), 1000) == 0
    assert not gate.admits(1000)
    gate.load_ended("3")
    assert gate.admits(1000)
    off = LoadPolicy(False)
    for number in range(99):
        assert off.admits(1000)
        assert off.load_planned(str(number), 1000) == 0


def test_now_and_then_a_load_is_tried_all_the_same() -> None:
    gate = fed(load=0.2, prefill=0.1)
    assert sum(gate.admits(1000) for _ in range(10 * PROBE_EVERY)) == 10


def test_a_faster_disk_is_noticed() -> None:
    gate = fed(load=0.2, prefill=0.1)
    requests = 0
    while not (gate.admits(1000) and gate.admits(1000)):
        requests += 1
        assert requests < 1000
        if gate.admits(1000):
            gate.observe_load(1000, 0.01)


def test_one_slow_call_decides_nothing() -> None:
    gate = LoadPolicy(True)
    gate.observe_load(1000, 30.0)  # threads start, a kernel is compiled
    for _ in range(MIN_SAMPLES):
        gate.observe_load(1000, 0.1)
        gate.observe_step(1000, 0.2)
    assert gate.admits(1000)
    gate.observe_step(1000, 0.0001)
    assert gate.admits(1000)


def test_decoding_and_empty_loads_say_nothing() -> None:
    gate = fed(load=0.2, prefill=0.1, samples=MIN_SAMPLES - 1)
    for _ in range(99):
        gate.observe_step(8, 0.01)
        gate.observe_load(0, 0.0)
    assert gate.admits(1000)
