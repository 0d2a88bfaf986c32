"""Load or recompute, from rates that are fed in."""

from __future__ import annotations

import math

import pytest

from kvtc_vllm.offload.load_policy import PROBE_EVERY, UNPROVEN_LOADS, LoadPolicy, Way
from kvtc_vllm.offload.pace import Pace
from kvtc_vllm.offload.rates import MIN_SAMPLES


class Clock:
    """Seconds, moved by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def fed(
    load: float,
    prefill: float,
    samples: int = MIN_SAMPLES,
    enabled: bool = True,
    clock: Clock | None = None,
) -> LoadPolicy:
    """A gate that saw these seconds for a thousand tokens."""
    gate = LoadPolicy(enabled, clock=clock or Clock())
    for _ in range(samples):
        loaded(gate, 1000, load)
        gate.observe_step(1000, prefill)
    return gate


def loaded(gate: LoadPolicy, tokens: int, seconds: float) -> None:
    gate.observe_loads(Pace(tokens, seconds))


def asked(gate: LoadPolicy, request_id: str = "asked", tokens: int = 1000) -> bool:
    """Whether a load is offered."""
    return gate.decide(request_id, tokens) is Way.LOAD


def test_the_faster_way_is_taken() -> None:
    assert asked(fed(load=0.1, prefill=0.2))
    assert not asked(fed(load=0.2, prefill=0.1))
    assert asked(fed(load=0.1, prefill=0.1))


def test_it_offers_all_while_it_knows_little_or_is_off() -> None:
    assert asked(fed(load=0.2, prefill=0.1, samples=MIN_SAMPLES - 1))
    assert asked(fed(load=0.2, prefill=0.1, enabled=False))
    only_loads = LoadPolicy(True)
    for _ in range(99):
        loaded(only_loads, 1, 99)
    assert asked(only_loads)


def test_a_load_waits_for_those_before_it() -> None:
    gate = fed(load=0.19, prefill=0.2)
    assert asked(gate, "0")
    assert gate.load_planned("0", 1000) == pytest.approx(0.2)
    # Two loads take .38, and a step of computing .2, which delays the load by .1.
    assert not asked(gate, "1")
    gate.load_ended("0")
    gate.load_ended("0")
    assert asked(gate, "2")


def test_a_queue_of_fast_loads_is_better_than_steps_that_delay_them_all() -> None:
    gate = fed(load=0.1, prefill=0.2)
    for number in range(99):
        assert asked(gate, str(number))
        # None waits longer than it would have if all had been computed; some patience is added,
        # as it is the faster way even after that.
        patience = 0.2 * (number + 1)
        assert gate.load_planned(str(number), 1000) == pytest.approx(patience)


def test_a_long_computation_delays_loads_by_a_step_only() -> None:
    gate = fed(load=0.19, prefill=0.2)  # in steps of a thousand tokens
    for number in range(4):
        gate.load_planned(str(number), 1000)
    # 14 seconds of loading against 10 of computing, and 4 times half a step.
    assert gate.decide("long", 10_000) is Way.COMPUTE


def test_a_computation_waits_for_those_before_it() -> None:
    gate = fed(load=0.19, prefill=0.2)
    gate.load_planned("load", 1000)
    assert gate.decide("computed", 1000) is Way.COMPUTE
    gate.computation_begins("computed", 1000, instead=True)
    # A second load takes no longer than a second computation.
    assert asked(gate, "second")
    assert gate.load_planned("second", 1000) == pytest.approx(0.6)
    # .57 of loading, and .1 until its end is seen, against .2 for each and .1 for every load.
    assert not asked(gate, "third")
    gate.load_ended("load")
    assert asked(gate, "third")


def test_all_that_the_engine_has_begun_is_before_a_computation() -> None:
    gate = fed(load=0.2, prefill=0.1)
    gate.computation_begins("a miss", 3000, instead=False)
    assert asked(gate)
    gate.step_planned(1, {"a miss": 2048, "decodes": 1})
    assert asked(gate)  # the step runs
    gate.step_ended(1)
    for _ in range(MIN_SAMPLES):
        gate.observe_step(1000, 0.1)
    assert not asked(gate)  # 952 are left
    gate.computation_begins("other", 1100, instead=False)
    assert asked(gate)
    gate.forget("other")
    gate.step_planned(2, {"a miss": 952})
    gate.step_ended(2)
    assert not asked(gate)


def test_while_loads_run_a_step_computes_no_more_than_the_shortest_has() -> None:
    """An engine sees at the end of a step that a load has ended."""
    gate = fed(load=0.3, prefill=0.2)
    gate.load_planned("long", 4000)
    gate.load_planned("short", 2000)
    ways = {}
    for number in range(4):
        ways[number] = gate.decide(str(number), 1000)
        if ways[number] is Way.COMPUTE:
            gate.computation_begins(str(number), 1000, instead=True)
    assert ways == {0: Way.COMPUTE, 1: Way.COMPUTE, 2: Way.LATER, 3: Way.LATER}
    assert gate.still_later("2")
    assert not gate.still_later("0")
    gate.step_planned(1, {"0": 1000, "1": 1000})
    assert not gate.still_later("2")
    assert gate.decide("2", 1000) is Way.COMPUTE


def test_what_was_put_off_is_before_what_is_asked_about_later() -> None:
    gate = fed(load=0.39, prefill=0.2)
    gate.load_planned("0", 1000)
    assert gate.decide("1", 1000) is Way.COMPUTE
    gate.computation_begins("1", 1000, instead=True)
    # .78 of loading against what is before each, its own .2 and the .1 that it would delay.
    assert gate.decide("2", 1000) is Way.LATER
    assert gate.decide("3", 1000) is Way.LATER
    assert gate.decide("4", 1000) is Way.LOAD
    gate.step_planned(1, {})
    assert gate.still_later("2")
    assert gate.still_later("3")
    assert gate.decide("5", 1000) is Way.LOAD
    gate.load_planned("5", 1000)
    assert gate.decide("6", 1000) is Way.LATER  # each was counted, and once


def test_nobody_is_put_off_beyond_its_turn() -> None:
    clock = Clock()
    gate = fed(load=10, prefill=0.2, clock=clock)
    gate.load_planned("running", 1000)
    gate.computation_begins("first", 1000, instead=True)
    assert gate.decide("second", 1000) is Way.LATER
    clock.now += 0.19
    assert gate.still_later("second")
    clock.now += 0.02
    assert not gate.still_later("second")
    assert gate.decide("second", 1000) is Way.COMPUTE


def test_who_was_put_off_is_loaded_if_loads_have_ended() -> None:
    gate = fed(load=0.3, prefill=0.2)
    for number in range(4):
        gate.load_planned(str(number), 1000)
    gate.computation_begins("first", 2000, instead=True)
    assert gate.decide("second", 1000) is Way.LATER
    for number in range(3):
        gate.step_planned(number, {})
        assert gate.still_later("second")
        gate.load_ended(str(number))
    gate.step_planned(9, {})
    assert not gate.still_later("second")
    assert asked(gate, "second")


def test_nothing_is_put_off_while_nothing_is_loaded() -> None:
    gate = fed(load=0.2, prefill=0.1)
    for number in range(9):
        # An engine without loads makes its own steps.
        assert gate.decide(str(number), 100_000 - number) is Way.COMPUTE


def test_who_waited_in_vain_for_a_load_is_computed() -> None:
    clock = Clock()
    gate = fed(load=0.1, prefill=0.2, clock=clock)
    assert asked(gate)
    patience = gate.load_planned("asked", 1000)
    clock.now += patience + 0.001
    gate.load_ended("asked")
    assert gate.decide("asked", 1000) is Way.COMPUTE
    gate.forget("asked")
    assert asked(gate)
    gate.load_planned("asked", 1000)
    gate.load_ended("asked")  # in time, and failed
    assert asked(gate)


def test_a_long_request_may_wait_longer() -> None:
    gate = fed(load=0.15, prefill=0.2)
    gate.load_planned("before", 4000)
    assert not asked(gate, "short", 1000)
    assert asked(gate, "long", 10_000)


def test_no_queue_builds_up_before_anything_is_known() -> None:
    gate = LoadPolicy(True)
    for number in range(UNPROVEN_LOADS):
        assert asked(gate, str(number))
        assert gate.load_planned(str(number), 1000) == 0
    assert gate.decide("one more", 1000) is Way.COMPUTE
    gate.load_ended("3")
    assert asked(gate)
    off = LoadPolicy(False)
    for number in range(99):
        assert asked(off, str(number))
        assert off.load_planned(str(number), 1000) == 0


def test_now_and_then_a_load_is_tried_all_the_same() -> None:
    gate = fed(load=0.2, prefill=0.1)
    assert sum(asked(gate, str(number)) for number in range(10 * PROBE_EVERY)) == 10


def test_no_load_is_tried_against_expectation_while_loads_end() -> None:
    gate = fed(load=0.2, prefill=0.1)
    for number in range(10 * PROBE_EVERY):
        assert not asked(gate, str(number))
        loaded(gate, 1000, 0.2)


def test_a_faster_disk_is_noticed() -> None:
    gate = fed(load=0.2, prefill=0.1)
    for number in range(1000):
        if asked(gate, str(number)):
            loaded(gate, 1000, 0.01)
            if asked(gate, "next"):
                return
    pytest.fail("the gate still refuses")


def test_one_slow_call_decides_nothing() -> None:
    gate = LoadPolicy(True)
    loaded(gate, 1000, 30.0)  # threads start, a kernel is compiled
    for _ in range(MIN_SAMPLES):
        loaded(gate, 1000, 0.1)
        gate.observe_step(1000, 0.2)
    assert asked(gate)
    gate.observe_step(1000, 0.0001)
    assert asked(gate)


def test_decoding_and_empty_loads_say_nothing() -> None:
    gate = fed(load=0.2, prefill=0.1, samples=MIN_SAMPLES - 1)
    for _ in range(99):
        gate.observe_step(8, 0.01)
        loaded(gate, 0, 0.0)
    assert asked(gate)


def test_short_steps_between_loads_do_not_tell_the_rate() -> None:
    gate = fed(load=0.15, prefill=0.1, samples=16)
    for _ in range(60):  # the recent windows of what was loaded, each with the costs of a step
        gate.observe_step(100, 0.05)
    assert not asked(gate)
    for _ in range(240):  # there are no others any more
        gate.observe_step(100, 0.05)
    assert asked(gate)


def test_a_tier_that_became_slow_is_noticed() -> None:
    gate = fed(load=0.05, prefill=0.1, samples=99)
    for _ in range(9):
        loaded(gate, 1000, 0.3)
    assert not asked(gate)


def test_a_slow_load_is_given_up_in_time() -> None:
    gate = fed(load=0.3, prefill=0.2)
    gate.computation_begins("first", 1000, instead=True)
    assert asked(gate)
    assert gate.load_planned("asked", 1000) == pytest.approx(0.4)


def test_those_who_waited_in_vain_begin_in_portions_too() -> None:
    clock = Clock()
    gate = fed(load=0.1, prefill=0.2, clock=clock)
    for name in ("a", "b", "c"):
        gate.load_planned(name, 1000)
    clock.now += 9
    gate.load_ended("a")
    gate.load_ended("b")
    assert gate.decide("a", 1000) is Way.COMPUTE
    gate.computation_begins("a", 1000, instead=True)
    assert gate.decide("b", 1000) is Way.LATER
    assert gate.still_later("b")
    gate.load_ended("c")
    assert not gate.still_later("b")
    assert gate.decide("b", 1000) is Way.COMPUTE


def test_nothing_is_kept_of_a_request_that_ended_before_its_load() -> None:
    clock = Clock()
    gate = fed(load=0.1, prefill=0.2, clock=clock)
    gate.load_planned("gone", 1000)
    gate.computation_begins("gone", 1000, instead=True)
    gate.forget("gone")
    clock.now += 9
    gate.load_ended("gone")
    assert asked(gate, "gone")
    assert not asked(fed(load=0.3, prefill=0.2), "other")
    kept = (gate._late, len(gate._loads), gate._put_off, gate._begun.tokens, gate._loads.left)
    assert not any(kept)


def test_what_is_expected_to_be_late_is_given_up_in_the_next_step() -> None:
    gate = LoadPolicy(True, clock=Clock())
    for _ in range(MIN_SAMPLES):
        loaded(gate, 100, 0.01)
        gate.observe_step(1000, 0.2)
    for number in range(4):
        gate.load_planned(str(number), 1000)
    assert gate.give_up() == []
    for _ in range(9):
        loaded(gate, 100, 0.04)  # the tier became four times as slow
    # 900 tokens of the first were loaded in time, the last 100 take .04 more.
    assert gate.give_up() == ["1", "3"]
    assert gate.give_up() == []  # told once
    assert not asked(gate, "1")
    gate.load_ended("1")
    assert not asked(gate, "1")


def test_a_load_that_hangs_is_learnt_from_before_it_ends() -> None:
    gate = fed(load=0.1, prefill=0.2)
    gate.load_planned("0", 1000)
    gate.load_planned("1", 1000)
    gate.observe_loads(Pace(running=500, running_seconds=0.05))
    assert gate.give_up() == []
    gate.observe_loads(Pace(running=500, running_seconds=0.3))
    assert gate.give_up() == []  # a step may have taken the processor
    gate.observe_loads(Pace(running=500, running_seconds=0.4))
    assert gate.give_up() == ["0", "1"]
    assert not asked(gate, "2")
    gate.observe_loads(Pace(running=500, running_seconds=0.01))
    assert not asked(gate, "2")  # another batch has just begun, and tells nothing
    loaded(gate, 500, 0.05)
    assert asked(gate, "2")


def test_a_load_goes_on_where_recomputing_what_is_left_takes_longer() -> None:
    clock = Clock()
    gate = fed(load=0.1, prefill=0.2, clock=clock)
    gate.load_planned("0", 1000)
    gate.computation_begins("since then", 5000, instead=False)
    clock.now += 0.19
    loaded(gate, 500, 0.06)
    assert gate.give_up() == []
    assert fed_and_late(keeps_part=True) == ["0"]
    assert fed_and_late(keeps_part=False) == []


def fed_and_late(keeps_part: bool) -> list[str]:
    """Given up of a load of which half is left when its time is over."""
    clock = Clock()
    gate = LoadPolicy(True, keeps_part=keeps_part, clock=clock)
    for _ in range(MIN_SAMPLES):
        gate.observe_step(1000, 0.2)
    gate.load_planned("0", 1000)
    for _ in range(MIN_SAMPLES):
        loaded(gate, 100, 0.03)
    clock.now += 0.15
    return gate.give_up()


def test_the_load_of_a_request_that_ended_runs_on_and_counts() -> None:
    clock = Clock()
    gate = fed(load=0.1, prefill=0.2, clock=clock)
    gate.load_planned("gone", 1000)
    gate.forget("gone")
    clock.now += 9
    assert gate.give_up() == []
    assert gate.tokens_before == 1000
    gate.load_ended("gone")
    assert gate.tokens_before == 0


def test_waiting_for_the_disk_is_worth_what_loading_saves() -> None:
    gate = fed(load=0.1, prefill=0.2)
    assert gate.worth_waiting(1000) == pytest.approx(0.1)
    gate.load_planned("before", 1000)
    assert gate.worth_waiting(1000) == pytest.approx(0.4 - 0.2)
    gate.computation_begins("computed", 500, instead=False)
    # .1 more, but its step hides the end of a load for half of its time.
    assert gate.worth_waiting(1000) == pytest.approx(0.4 + 0.1 - 0.2 - 0.05)
    assert fed(load=0.1, prefill=0.2, enabled=False).worth_waiting(1000) == math.inf
    assert LoadPolicy(True).worth_waiting(1000) == math.inf


def test_ranks_report_their_own_tokens() -> None:
    gate = LoadPolicy(True, ranks=2)
    gate.load_planned("0", 1000)
    loaded(gate, 1000, 0.1)
    assert gate.tokens_before == 500
