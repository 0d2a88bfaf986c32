"""Rounds of the ranks of an engine that starts: none waits for one that does not come."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

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
