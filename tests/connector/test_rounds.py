"""Rounds of the ranks of an engine that starts: none waits for one that does not come."""

from __future__ import annotations

import threading
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from torch import distributed

from kvtc_vllm.config import ConfigError
from kvtc_vllm.connector import rounds
from kvtc_vllm.connector.rounds import Rounds
from tests.offload.two_ranks import Meeting, at_once


def test_every_rank_gets_what_all_give() -> None:
    meeting = Meeting()
    assert at_once(lambda rank: Rounds(partial(meeting, rank))(b"%d" % rank)) == [[b"0", b"1"]] * 2


@pytest.mark.parametrize("held", [0, 1, 2])
def test_a_rank_that_can_not_start_tells_the_others(held: int) -> None:
    """Whatever round they are in; and who was told tells nobody."""
    meeting = Meeting()

    def start(rank: int) -> None:
        with Rounds(partial(meeting, rank)) as own:
            for number in range(3):
                if rank == 1 and number == held:
                    raise ConfigError("no artifact here")
                own(number)

    others, failed = at_once(start)
    assert isinstance(others, RuntimeError)
    assert "another rank could not start" in str(others)
    assert isinstance(failed, ConfigError)


def test_all_ranks_may_fail_at_once() -> None:
    meeting = Meeting()

    def start(rank: int) -> None:
        with Rounds(partial(meeting, rank)):
            raise ConfigError(f"rank {rank}")

    assert [str(error) for error in at_once(start)] == ["rank 0", "rank 1"]


def test_what_fails_behind_the_last_round_is_of_no_concern_to_the_others() -> None:
    meeting = Meeting()

    def start(rank: int) -> list[Any]:
        with Rounds(partial(meeting, rank)) as own:
            found = own(rank)
            own.started()
            if rank == 1:
                raise ConfigError("the disk is full")
            return found

    found, failed = at_once(start)
    assert found == [0, 1]
    assert isinstance(failed, ConfigError)


def test_ranks_that_died_do_not_hide_what_ended_the_start() -> None:
    def gather(value: Any) -> list[Any]:
        raise RuntimeError("connection closed by peer")

    with pytest.raises(ConfigError, match="no artifact here"), Rounds(gather):
        raise ConfigError("no artifact here")


def test_ranks_are_counted_stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tensor-parallel ranks in each of two stages, as this one, of stage 1, sees them."""
    sizes = {"tensor": 3, "stages": 2}
    given: list[Any] = []

    def all_gather(found: list[Any], value: Any, group: str) -> None:
        given.append(value)
        if group == "tensor":
            found[:] = [f"1.{n}" for n in range(3)]
        else:
            found[:] = [[f"0.{n}" for n in range(3)], value]

    def group(name: str) -> Any:
        return SimpleNamespace(world_size=sizes[name], cpu_group=name)

    arrived = SimpleNamespace(wait=lambda timeout: None)
    monkeypatch.setattr(rounds.torch.distributed, "barrier", lambda group, async_op: arrived)
    monkeypatch.setattr(rounds.torch.distributed, "all_gather_object", all_gather)
    monkeypatch.setattr(rounds, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(rounds, "get_tp_group", lambda: group("tensor"))
    monkeypatch.setattr(rounds, "get_pp_group", lambda: group("stages"))
    assert rounds.among_ranks("1.1") == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    assert given[0] == "1.1"
    assert isinstance(rounds.rounds_of_engine(), Rounds)

    sizes.update(tensor=1, stages=1)
    given.clear()
    assert rounds.among_ranks("own") == ["own"]
    assert given == []
    assert rounds.rounds_of_engine() is None


@pytest.mark.filterwarnings("ignore:You are using a Backend")
def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM failed on it between our constructor and the caches, and its process lives on."""
    monkeypatch.setattr(rounds, "PATIENCE_SECONDS", 60.0)
    store, ended = distributed.HashStore(), threading.Event()

    def start(rank: int) -> Any:
        """Rank 1 comes to the first round only."""
        pair = distributed.ProcessGroupGloo(store, rank, 2, timedelta(minutes=30))
        group: Any = SimpleNamespace(world_size=2, cpu_group=pair)
        found = rounds._gathered(group, f"from {rank}")
        if rank == 1:
            ended.wait(60)
            return found
        monkeypatch.setattr(rounds, "PATIENCE_SECONDS", 1.0)
        try:
            with Rounds(partial(rounds._gathered, group)) as own:
                own("there?")
        finally:
            ended.set()

    waited, absent = at_once(start)
    assert absent == ["from 0", "from 1"]
    assert isinstance(waited, RuntimeError)
    assert "another rank did not come to the start within 1 seconds" in str(waited)


@pytest.mark.parametrize(
    ("engines", "balances", "shared"), [(1, False, False), (2, False, True), (2, True, False)]
)
def test_engines_that_share_experts_meet(
    monkeypatch: pytest.MonkeyPatch, engines: int, balances: bool, shared: bool
) -> None:
    parallel = SimpleNamespace(data_parallel_size=engines, enable_eplb=balances)
    config: Any = SimpleNamespace(parallel_config=parallel)
    group = SimpleNamespace(world_size=2, cpu_group="data")
    met: list[Any] = []
    monkeypatch.setattr(rounds, "get_dp_group", lambda: group)
    monkeypatch.setattr(rounds, "_gathered", lambda group, own: met.append((group, own)) or [own])
    assert rounds.shares_experts(config) is shared
    gather = rounds.among_engines(config)
    assert (gather is not None) is shared
    if gather is not None:
        assert gather("own") == ["own"]
        assert met == [(group, "own")]
