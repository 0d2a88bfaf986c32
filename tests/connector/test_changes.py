"""Resets and changes of weights, seen by the scheduler's side: names, generations, taint."""

from __future__ import annotations

from typing import Any

import pytest

from kvtc_vllm.offload.messages import StepMetadata, WorkerReport
from tests.connector.fakes import (
    BLOCK,
    FakeBlockPool,
    FakeOutput,
    FakeRequest,
    confirm,
    fill,
    scheduler,
    start,
    step,
)


class Engine:
    """A scheduler's side with vLLM's pool of blocks."""

    def __init__(self, **extra: Any) -> None:
        self.side = scheduler(recent_window=0, **extra)
        self.pool = FakeBlockPool()
        self.side.bind_gpu_blocks(self.pool)

    def begin(self, name: str, tokens: int = 300, local: int = 0, prompt: str = "a") -> Any:
        """A new request and its first step."""
        request = FakeRequest(name, tokens, name=prompt)
        blocks = list(range(-(-tokens // BLOCK)))
        return request, start(self.side, request, blocks, tokens - local, local)

    def found_stale(self, step: int) -> None:
        """Workers found other weights in a step."""
        self.side.apply_report(WorkerReport(self.side._epoch, stale_since=step, step=step), None)

    def named(self, step: int, other_weights: bool) -> None:
        """Workers made the names of this epoch in a step."""
        report = WorkerReport(
            self.side._epoch, named_in=step, other_weights=other_weights, step=step
        )
        self.side.apply_report(report, None)

    def next_step(self) -> StepMetadata:
        return self.side.plan_step(FakeOutput())

    def changes(self) -> float:
        stats = self.side.take_stats()
        return 0.0 if stats is None else stats.data.get("weight_changes", 0.0)


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_a_reset_starts_a_generation_that_nobody_had_before(engine: Engine) -> None:
    seen = set()
    for epoch in range(4):
        metadata = engine.next_step()
        assert metadata.epoch == epoch
        assert len(metadata.generation) == (8 if epoch else 0)
        seen.add(metadata.generation)
        engine.side.reset()
    assert len(seen) == 4


def test_other_weights_give_up_all_names_within_the_generation(engine: Engine) -> None:
    fill(engine.side, FakeRequest("r", 300))
    engine.side.reset()
    generation = engine.next_step().generation
    fill(engine.side, FakeRequest("s", 300))
    assert engine.side.match(FakeRequest("t", 300), 0) == 256
    engine.found_stale(step=9)
    assert engine.side.match(FakeRequest("t", 300), 0) == 0
    metadata = engine.next_step()
    assert (metadata.epoch, metadata.generation) == (2, generation)
    engine.named(10, other_weights=True)
    assert engine.changes() == 1


def test_late_reports_of_older_names_change_nothing(engine: Engine) -> None:
    engine.found_stale(step=1)
    engine.side.apply_report(WorkerReport(0, stale_since=1, stored=[(b"a:3", 0, 10)]), None)
    assert engine.next_step().epoch == 1
    assert len(engine.side.index) == 0


def test_a_request_that_ran_before_a_change_is_never_stored_again(engine: Engine) -> None:
    old, metadata = engine.begin("old", 300)
    assert metadata.number == 1
    engine.found_stale(step=2)
    new, _ = engine.begin("new", 300, prompt="b")
    for request in (old, new):
        request.grow(500)
    assert step(engine.side, old, 150, new_blocks=([20, 21, 22, 23, 24, 25],)).stores == []
    # What was dropped in the step of the change is stored now, under the new name.
    later = step(engine.side, new, 150, new_blocks=([30, 31, 32, 33, 34, 35],))
    assert [item.start for item in later.stores] == [256]


def test_a_request_that_began_with_the_new_weights_is_stored_from_its_start(
    engine: Engine,
) -> None:
    request, metadata = engine.begin("r", 300)
    assert len(metadata.stores) == 2
    engine.found_stale(step=metadata.number)  # its stores were dropped, too
    request.grow(500)
    later = step(engine.side, request, 150, new_blocks=([20, 21, 22, 23, 24, 25],))
    assert [item.start for item in later.stores] == [0, 128, 256]


@pytest.mark.parametrize("reset", ["before", "after", "never"])
def test_blocks_of_before_a_change_are_not_stored_under_a_new_name(
    engine: Engine, reset: str
) -> None:
    """vLLM's cache serves them until it is emptied."""
    engine.begin("r", 300)
    if reset == "before":
        engine.pool.reset()
    _, metadata = engine.begin("s", 300, prompt="b")
    assert metadata.check is (reset == "before")
    engine.found_stale(step=metadata.number)
    if reset == "after":
        engine.pool.reset()
    _, metadata = engine.begin("t", 300, local=128)
    assert len(metadata.stores) == (0 if reset == "never" else 2)
    _, metadata = engine.begin("u", 300, prompt="c")
    assert len(metadata.stores) == 2  # all of its own


def test_a_change_after_steps_of_unknown_weights_taints_what_they_left(engine: Engine) -> None:
    """Reset, some steps without a look at the weights, then a change: when was it?"""
    engine.pool.reset()
    for name in ("r", "s"):
        _, metadata = engine.begin(name, 300, prompt=name)
    engine.found_stale(step=metadata.number)
    assert engine.begin("t", 300, local=128)[1].stores == []


def test_the_weights_are_compared_in_the_first_step_after_vllms_own_reset(engine: Engine) -> None:
    engine.begin("r", 300)
    assert not engine.next_step().check
    engine.pool.reset()
    assert not engine.next_step().check  # nothing computes: the model may be asleep
    assert engine.begin("s", 300, prompt="b")[1].check
    assert not engine.begin("t", 300, prompt="c")[1].check


def test_after_a_reset_that_left_vllms_blocks_nothing_is_stored_on_top_of_them(
    engine: Engine,
) -> None:
    """Requests ran, so vLLM kept its cache; were the weights exchanged? Workers will tell."""
    running, _ = engine.begin("running", 300)
    engine.side.reset()
    running.grow(500)
    assert step(engine.side, running, 150, new_blocks=([20, 21, 22, 23, 24, 25],)).stores == []
    _, metadata = engine.begin("r", 300, local=128)
    assert metadata.stores == []
    engine.named(metadata.number, other_weights=False)
    assert engine.changes() == 0
    assert len(engine.begin("s", 300, local=128)[1].stores) == 2


def test_blocks_of_after_a_reset_are_trusted_at_once(engine: Engine) -> None:
    """Two requests of one prefix in the first step: the second uses blocks of the first."""
    engine.begin("r", 300)
    engine.pool.reset()
    engine.side.reset()
    assert len(engine.begin("s", 300)[1].stores) == 2
    assert len(engine.begin("t", 500, local=128)[1].stores) == 1
    engine.named(2, other_weights=True)
    assert len(engine.begin("u", 700, local=128)[1].stores) == 2


def test_a_reset_with_other_weights_distrusts_vllms_blocks(engine: Engine) -> None:
    engine.begin("running", 300)
    engine.side.reset()
    _, metadata = engine.begin("r", 300, local=128)
    engine.named(metadata.number, other_weights=True)
    assert engine.changes() == 1
    assert engine.begin("s", 300, local=128)[1].stores == []
    engine.pool.reset()
    assert len(engine.begin("t", 300, local=128)[1].stores) == 2


def test_a_preempted_request_that_starts_again_may_be_stored(engine: Engine) -> None:
    request, _ = engine.begin("r", 300)
    engine.pool.reset()
    engine.side.reset()
    request.num_computed_tokens, request.num_preemptions = 0, 1
    engine.side.match(request, 0)
    engine.side.plan_load(request, (list(range(10)),), 0)
    again = step(engine.side, request, 300, resumed=True, new_blocks=(list(range(10)),))
    assert len(again.stores) == 2


# ---------------------------------------------------------- loads that others wait for


class Status:
    def __init__(self, name: str) -> None:
        self.name = name


LOADING, WAITING = Status("WAITING_FOR_REMOTE_KVS"), Status("WAITING")


def load(engine: Engine, name: str, tokens: int = 300) -> Any:
    """A request whose load has begun."""
    request: Any = FakeRequest(name, tokens)
    found = engine.side.match(request, 0)
    assert found
    engine.side.plan_load(request, (list(range(10)),), found)
    request.status = LOADING
    return request


def waits(engine: Engine) -> float:
    stats = engine.side.take_stats()
    return 0.0 if stats is None else stats.data.get("shared_load_waits", 0.0)


def test_the_second_request_of_a_prefix_waits_for_the_first(engine: Engine) -> None:
    fill(engine.side, FakeRequest("r", 300))
    first = load(engine, "first")
    second = FakeRequest("second", 400)
    assert engine.side.match(second, 0) is engine.side.match(second, 0) is None
    assert waits(engine) == 1
    engine.side.apply_report(None, {"first"})
    assert engine.side.match(second, 0) is None  # vLLM has not shared the blocks yet
    first.status = WAITING
    assert engine.side.match(second, 256) == 0


def test_another_prefix_waits_for_nobody(engine: Engine) -> None:
    for prompt in ("a", "b"):
        fill(engine.side, FakeRequest(prompt, 300, name=prompt))
    load(engine, "first")
    assert engine.side.match(FakeRequest("other", 300, name="b"), 0) == 256
    # All that it shares is in vLLM's own cache already.
    assert engine.side.match(FakeRequest("same", 300), 256) == 0


def test_nobody_waits_for_an_aborted_load(engine: Engine) -> None:
    fill(engine.side, FakeRequest("r", 300))
    first = load(engine, "first")
    second = FakeRequest("second", 300)
    assert engine.side.match(second, 0) is None
    engine.side.finish(first)
    assert engine.side.match(second, 0) == 256


def test_after_a_failed_load_the_next_one_is_offered_what_is_left(engine: Engine) -> None:
    fill(engine.side, FakeRequest("r", 300))
    first = load(engine, "first")
    second = FakeRequest("second", 300)
    assert engine.side.match(second, 0) is None
    engine.side.apply_report(WorkerReport(0, bad=[b"a:7"]), {"first"})
    first.status = WAITING
    assert engine.side.match(second, 0) == 128


def test_a_request_does_not_wait_for_itself(engine: Engine) -> None:
    fill(engine.side, FakeRequest("r", 300))
    first = load(engine, "first")
    assert engine.side.match(first, 0) == 256


def test_loads_of_before_a_reset_are_waited_for_by_nobody(engine: Engine) -> None:
    fill(engine.side, FakeRequest("r", 300))
    load(engine, "first")
    engine.side.reset()
    _, metadata = engine.begin("new", 300)
    confirm(engine.side, metadata)
    assert engine.side.match(FakeRequest("second", 300), 0) == 256


def test_nothing_is_stored_after_a_change_while_other_engines_hold_experts() -> None:
    """They get their new weights later: what is computed meanwhile is of both."""
    engine = Engine(shares_experts=True)
    old, metadata = engine.begin("old", 300)
    assert len(metadata.stores) == 2
    _, metadata = engine.begin("new", 300, prompt="b")
    engine.found_stale(step=metadata.number)
    metadata = engine.next_step()
    assert len(metadata.generation) == 8  # its names are made without the other engines
    engine.named(metadata.number, other_weights=True)
    _, metadata = engine.begin("later", 300, prompt="c")
    assert metadata.stores == []
    old.grow(500)
    assert step(engine.side, old, 150, new_blocks=([20, 21, 22, 23, 24, 25],)).stores == []

    # When all have theirs, a reset tells. Blocks of both that vLLM keeps are of no use still.
    engine.side.reset()
    reset = engine.next_step()
    assert reset.generation != metadata.generation
    engine.named(reset.number, other_weights=False)
    _, metadata = engine.begin("on old blocks", 300, local=128, prompt="c")
    assert metadata.stores == []
    _, metadata = engine.begin("own blocks", 300, prompt="d")
    assert len(metadata.stores) == 2
    engine.pool.reset()
    _, metadata = engine.begin("behind vLLM's reset", 300, local=128, prompt="c")
    assert len(metadata.stores) == 2


def test_weights_that_a_reset_found_need_no_other() -> None:
    """All engines are given new weights, then all are reset: the usual order."""
    engine = Engine(shares_experts=True)
    engine.begin("old", 300)
    engine.pool.reset()
    engine.side.reset()
    metadata = engine.next_step()
    engine.named(metadata.number, other_weights=True)
    _, metadata = engine.begin("new", 300, prompt="b")
    assert len(metadata.stores) == 2
