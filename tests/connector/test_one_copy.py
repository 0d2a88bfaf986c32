"""Whether ranks share one copy of latents, and how they come by the memory for it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvtc_vllm.config import ConfigError, load_config
from kvtc_vllm.connector import one_copy
from kvtc_vllm.connector.connector import KVTCConnector
from kvtc_vllm.connector.messages import WorkerStart
from kvtc_vllm.offload.geometry import CacheGeometry
from kvtc_vllm.tiers import shared_arena
from kvtc_vllm.tiers.shared_arena import SharedArena, SharedView
from tests.connector.fakes import geometry
from tests.offload.two_ranks import Meeting, at_once

MIB = 1 << 20


def latents(tp_size: int = 2) -> CacheGeometry:
    plain = geometry(tp_size)
    return replace(plain, groups=(replace(plain.only_group, latent=True),))


def settings(**extra: Any) -> Any:
    return load_config({"codec": "raw", "memory_bytes": MIB, **extra})


REFUSED: dict[str, tuple[Any, CacheGeometry]] = {
    "joint": (settings(joint="exact"), latents()),
    "degrade": (settings(codec="kvtc2", degrade="memory"), latents()),
    "disk_write": (settings(disk_path="/nowhere", disk_write="behind"), latents()),
    "stage": (settings(), replace(latents(), pp_size=2)),
    "group": (settings(), replace(latents(), groups=latents().groups * 2)),
}


def test_latents_of_several_ranks_are_kept_once() -> None:
    assert one_copy.wants_one_copy(settings(), latents())
    assert one_copy.wants_one_copy(settings(latent_copies="one"), latents())
    assert one_copy.wants_one_copy(settings(disk_path="/nowhere"), latents(8))
    assert not one_copy.wants_one_copy(settings(latent_copies="each"), latents())
    assert not one_copy.wants_one_copy(settings(), latents(), foreign=True)
    for other in (latents(1), geometry(2), geometry(1)):
        assert not one_copy.wants_one_copy(settings(), other)
    # One rank has one copy.
    assert not one_copy.wants_one_copy(settings(latent_copies="one"), latents(1))
    with pytest.raises(ConfigError, match="alike"):
        one_copy.wants_one_copy(settings(latent_copies="one"), geometry(2))


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_is_a_copy_per_rank(what: str, caplog: pytest.LogCaptureFixture) -> None:
    config, shape = REFUSED[what]
    with caplog.at_level("INFO", logger="vllm.kvtc"):
        assert not one_copy.wants_one_copy(config, shape, says=True)
    assert what.partition("_")[0] in caplog.text
    with pytest.raises(ConfigError, match=r"latent_copies='one' can't be: .*; set 'auto'"):
        one_copy.wants_one_copy(
            load_config({"latent_copies": "one", **_given(what)}), shape, foreign=False
        )


def _given(what: str) -> dict[str, Any]:
    return {
        "joint": {"codec": "raw", "joint": "exact"},
        "degrade": {"codec": "kvtc2", "degrade": "memory"},
        "disk_write": {"codec": "raw", "disk_path": "/nowhere", "disk_write": "behind"},
    }.get(what, {"codec": "raw"})


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def sharing(config: Any) -> Callable[[int], Any]:
    meeting = Meeting()
    return lambda rank: one_copy.share_memory(config, rank, partial(meeting, rank))


def test_the_others_get_the_first_ranks_memory(
    directory: Path,
) -> None:
    arena, view = at_once(sharing(settings()))
    assert isinstance(arena, SharedArena)
    assert isinstance(view, SharedView)
    arena.write(b"a", b"all that there is")
    ((_, place),) = arena.places([b"a"])
    assert view.read_at(place) == b"all that there is"
    # Nobody can come later.
    assert list(directory.iterdir()) == []
    arena.close()
    view.close()


def test_pages_begin_where_the_first_rank_has_them(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have made fewer than were asked for, behind a smaller table."""
    monkeypatch.setattr(shared_arena, "_MOST_PAGES", 3)
    arena, view = at_once(sharing(settings(memory_bytes=64 * MIB)))
    arena.write(b"a", b"all that there is")
    ((_, place),) = arena.places([b"a"])
    assert view.read_at(place) == b"all that there is"
    arena.close()
    view.close()


def test_a_long_path_for_temporary_files_is_no_obstacle(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = directory / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    arena, view = at_once(sharing(settings()))
    assert isinstance(view, SharedView)
    assert list(deep.iterdir()) == []
    arena.close()
    view.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_if_one_rank_can_not_all_keep_their_own(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rank: int,
) -> None:
    def fail(*args: Any) -> Any:
        raise OSError("no such thing here")

    monkeypatch.setattr(one_copy, ("SharedArena", "_receive")[rank], fail)
    with caplog.at_level("WARNING", logger="vllm.kvtc"):
        assert at_once(sharing(settings())) == [None, None]
    (record,) = caplog.records
    assert "every rank keeps a copy of its own of all latents" in record.getMessage()
    assert "no such thing here" in record.getMessage()
    assert list(directory.iterdir()) == []

    refused = at_once(sharing(settings(latent_copies="one")))
    assert all(isinstance(error, ConfigError) for error in refused)
    assert "no such thing here" in str(refused[0])


class Scheduler:
    """What a connector makes for its scheduler's role."""

    def __init__(self, one_copy: bool) -> None:
        self.one_copy = one_copy
        self.restored: Any = None
        self.pools: list[Any] = []
        self.restore = partial(setattr, self, "restored")
        self.bind_gpu_blocks = self.pools.append


def connector(bound: int = 1000) -> Any:
    """One that waits for its workers."""
    made: Any = object.__new__(KVTCConnector)
    made._config, made._geometry, made._bound = settings(), latents(), bound
    made._scheduler = made._worker = made._block_pool = None
    made._make_scheduler = Scheduler
    return made


def test_the_scheduler_does_as_its_workers_do() -> None:
    shared = connector()
    shared.bind_gpu_block_pool("pool")
    starts = {(0, 0): WorkerStart([(b"a", 1)], True), (0, 1): WorkerStart(None, True)}
    shared.set_xfer_handshake_metadata_pp_aware(starts)
    side = shared._live_scheduler
    assert side.one_copy
    assert side.restored == {0: [(b"a", 1)]}
    assert side.pools == ["pool"]

    alone = connector()
    alone.set_xfer_handshake_metadata({0: WorkerStart([]), 1: WorkerStart([])})
    assert not alone._live_scheduler.one_copy
    assert alone._live_scheduler.restored == {0: [], 1: []}

    # Workers that share nothing and have no disk say nothing.
    silent = connector()
    silent.bind_gpu_block_pool("pool")
    assert not silent._live_scheduler.one_copy
    assert silent._live_scheduler.pools == ["pool"]


class OthersStart:
    """What a connector beside ours tells its scheduler's side."""


def test_another_connector_s_handshake_is_not_ours(caplog: pytest.LogCaptureFixture) -> None:
    """`MultiConnector` gives all of them the first that there is."""
    beside = connector()
    beside._config = settings(disk_path="/var/cache/kvtc", disk_bytes="1GiB")
    with caplog.at_level("WARNING", logger="vllm.kvtc"):
        beside.set_xfer_handshake_metadata_pp_aware({(0, 0): OthersStart(), (0, 1): OthersStart()})
    assert "what is on disk from before is not offered" in caplog.text
    assert beside._live_scheduler.restored == {}
    assert not beside._live_scheduler.one_copy


def test_copies_of_all_ranks_need_room() -> None:
    small = connector(bound=MIB * 3 // 4)
    with pytest.raises(ConfigError, match="too small for one chunk: 2 rank"):
        small.set_xfer_handshake_metadata({0: WorkerStart([])})
