"""One copy for all ranks: what makes it valid, who reads it, and what becomes of faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtc_vllm.offload.messages import StepMetadata, StoreItem
from kvtc_vllm.offload.names import Names, Proof
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.shared_arena import PAGE, SharedView, page_bytes
from tests.connector.fakes import BLOCK
from tests.offload.two_ranks import BLOCKS, CHUNK, PATIENCE, RAW_BYTES, TwoRanks

Make = Callable[..., TwoRanks]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[TwoRanks] = []

    def engine(*args: Any, **extra: Any) -> TwoRanks:
        made.append(TwoRanks(*args, **extra))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def files(root: Path) -> list[Path]:
    """Chunks on disk, of whatever namespace, those that are being written included."""
    return [path for path in root.rglob("*") if path.is_file() and path.stat().st_size > RAW_BYTES]


def until_files(engine: TwoRanks, root: Path, number: int) -> list[Path]:
    """Step until so many are written to their end; returns them."""

    def written() -> bool:
        found = files(root)
        return len(found) >= number and all(path.suffix != ".tmp" for path in found)

    engine.step_until(written)
    found = files(root)
    assert len(found) == number
    return found


def until_kept(engine: TwoRanks, number: int) -> None:
    """Step until memory holds so many chunks and the scheduler knows."""
    engine.step_until(
        lambda: len(engine.arena.keys()) >= number and not engine.scheduler.index.pending
    )


class Held:
    """A rank's reads wait until they may go on."""

    def __init__(self, engine: TwoRanks, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reading, self.go_on = threading.Event(), threading.Event()
        view = engine.ranks[1].worker._view
        assert view is not None
        read = SharedView.read_at

        def held(this: SharedView, place: int) -> bytearray:
            self.reading.set()
            assert self.go_on.wait(20)
            return read(this, place)

        monkeypatch.setattr(SharedView, "read_at", held)


def test_both_ranks_get_what_the_first_one_keeps(make: Make) -> None:
    engine = make()
    engine.store("a", block=0, chunks=2)
    counts = engine.counters()
    assert counts["stored_chunks"] == 2
    assert counts["stored_raw_bytes"] == 2 * RAW_BYTES
    # Once, in whole pages.
    assert engine.scheduler.index.ready_bytes == engine.arena.used
    assert engine.arena.used % PAGE == 0
    assert 2 * RAW_BYTES < engine.arena.used < 2 * (RAW_BYTES + 2 * PAGE)

    assert engine.load("a", block=20, chunks=2) == set()
    assert engine.counters()["loaded_tokens"] == 2 * 2 * CHUNK
    first, second = engine.ranks
    for offset in range(2 * BLOCKS):
        assert not torch.equal(first.page(offset), second.page(offset))
        assert torch.equal(first.page(20 + offset), first.page(offset))
        assert torch.equal(second.page(20 + offset), first.page(offset))


def test_all_of_memory_holds_one_copy(make: Make) -> None:
    engine = make(room=4)
    for name in "abcdef":
        engine.store(name)
    assert [engine.found(name) for name in "abcdef"] == [0, 0, CHUNK, CHUNK, CHUNK, CHUNK]
    assert len(engine.arena) == 4


@pytest.mark.parametrize("changed", [0, 1])
def test_a_store_fails_if_any_rank_has_other_weights(
    make: Make, tmp_path: Path, changed: int
) -> None:
    engine = make(tmp_path)
    engine.store("before")
    assert engine.written(1) == 1
    written = files(tmp_path)
    before = [rank.codec.identity for rank in engine.ranks]
    assert before[0] == before[1]
    original = engine.ranks[changed].model.weight.detach().clone()

    with torch.no_grad():
        engine.ranks[changed].model.weight.add_(1.0)
    engine.compute("between", block=8)
    engine.settle()
    assert engine.found("between") == 0
    # Neither in the old weights' namespace, although the other rank saw nothing, nor in another.
    assert files(tmp_path) == written

    engine.store("after", block=16)
    assert engine.found("before") == 0
    assert engine.found("after") == CHUNK
    after = [rank.codec.identity for rank in engine.ranks]
    assert after[0] == after[1] != before[0]
    assert engine.written(1) == 2

    # Both ranks' weights are those of the first name again.
    with torch.no_grad():
        engine.ranks[changed].model.weight.copy_(original)
    engine.compute("between", block=24)
    engine.settle()
    engine.store("again", block=32)
    assert [rank.codec.identity for rank in engine.ranks] == before


@pytest.mark.parametrize("changed", [0, 1])
def test_what_one_rank_rejects_no_rank_writes_with_a_copy_each_either(
    make: Make, tmp_path: Path, changed: int
) -> None:
    """The other rank's name is still its own, but what it computed is not of that name."""
    engine = make(tmp_path, one_copy=False)
    engine.store("before")
    written = until_files(engine, tmp_path, 2)
    with torch.no_grad():
        engine.ranks[changed].model.weight.add_(1.0)
    engine.compute("between", block=8)
    engine.settle()
    assert engine.found("between") == 0
    assert files(tmp_path) == written
    engine.store("after", block=16)
    until_files(engine, tmp_path, 4)
    assert engine.found("after") == CHUNK


@pytest.mark.parametrize("changed", [0, 1])
def test_what_one_rank_s_weights_changed_is_found_under_no_rank_s_old_name(
    make: Make, tmp_path: Path, changed: int
) -> None:
    """Every rank's KV depends on all ranks' weights, and its name on its own alone."""
    engine = make(tmp_path, one_copy=False, room=4)
    engine.store("a")
    until_files(engine, tmp_path, 2)
    with torch.no_grad():
        engine.ranks[changed].model.weight.add_(1.0)
    engine.compute("between", block=8)
    engine.settle()
    assert engine.found("a") == 0
    engine.store("a", block=16)
    assert engine.written(1) >= 1
    for name in "bcd":  # which take its place in memory
        engine.store(name, block=24)
    assert engine.load("a", block=40) == set()
    for rank in engine.ranks:
        assert torch.equal(rank.page(40), rank.page(16))


@pytest.mark.parametrize("changed", [0, 1])
def test_the_end_writes_nothing_that_other_ranks_may_reject(
    make: Make, tmp_path: Path, changed: int
) -> None:
    """What only pages hold is of all ranks' weights, and this one knows its own."""
    engine = make(tmp_path, one_copy=False)
    with torch.no_grad():
        engine.ranks[changed].model.weight.add_(1.0)
    kept = StepMetadata(number=1, tokens=1, kept=[StoreItem(RecordKey(b"k"), 0, [0, 1, 2, 3])])
    engine.both(lambda rank: rank.turn(kept))
    engine.close()
    assert files(tmp_path) == []


@pytest.mark.parametrize("changed", [0, 1])
def test_the_end_writes_of_memory_what_all_ranks_have_stored(
    make: Make, tmp_path: Path, changed: int
) -> None:
    engine = make(tmp_path, one_copy=False, disk_write="behind")
    engine.store("before")
    assert files(tmp_path) == []
    with torch.no_grad():
        engine.ranks[changed].model.weight.add_(1.0)
    engine.compute("between", block=8)
    sound = engine.ranks[1 - changed].worker
    until = time.monotonic() + PATIENCE
    while len(sound.arena.keys()) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    engine.close()
    assert len(files(tmp_path)) == 2  # of the first chunk, a part from each rank


@pytest.mark.parametrize("changed", [0, 1])
def test_a_load_fails_if_any_rank_has_other_weights(make: Make, changed: int) -> None:
    engine = make()
    engine.store("a")
    step = engine.begin_load("a", block=20)
    with torch.no_grad():
        engine.ranks[changed].model.weight.add_(1.0)
    engine.apply(step)
    engine.settle()
    assert engine.bad == set(range(20, 20 + BLOCKS))
    assert engine.found("a") == 0


@pytest.mark.parametrize("silent", [0, 1])
def test_a_lost_report_leaves_a_chunk_unoffered_and_unwritten(
    make: Make, tmp_path: Path, silent: int
) -> None:
    engine = make(tmp_path)
    engine.silent.add(silent)
    engine.compute("a")
    for _ in range(20):
        engine.step()
    assert engine.found("a") == 0
    assert files(tmp_path) == []
    assert engine.scheduler.has_pending_work()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_costs_the_chunk(
    make: Make, tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(tmp_path)

    def fail(*args: Any) -> None:
        raise RuntimeError("no more memory")

    rank = engine.ranks[failing]
    transfer = rank.worker.transfers[0]
    with monkeypatch.context() as patch:
        if failing == 0:
            patch.setattr(transfer, "encode", fail)
        else:
            sample = type("Sample", (), {"matches": fail})()
            patch.setattr(rank.names, "prove", lambda *args, **kw: Proof(*args[:2], (sample,)))
        engine.compute("a")
        engine.settle()
    assert engine.found("a") == 0
    assert engine.counters()["dropped_stores/error"] == 1
    engine.step()  # which tells the first rank to forget it
    assert len(engine.arena) == 0
    assert files(tmp_path) == []
    engine.store("a")
    assert engine.found("a") == CHUNK


@pytest.mark.parametrize("aborted", [False, True])
def test_nothing_is_evicted_that_a_rank_still_reads(
    make: Make, monkeypatch: pytest.MonkeyPatch, aborted: bool
) -> None:
    """Nor if the request has ended meanwhile: vLLM keeps its blocks until the load ends."""
    engine = make(room=3)
    engine.store("a")
    held = Held(engine, monkeypatch)
    step = engine.begin_load("a", block=20)
    (item,) = step.loads[0].items
    engine.apply(step)
    assert held.reading.wait(20)
    if aborted:
        engine.abort(step)
    for number in range(6):
        engine.compute(f"other{number}", block=4 * (number % 4))
        for _ in range(20):
            engine.step()
    assert engine.scheduler.index.is_ready(item.key)
    held.go_on.set()
    engine.settle()
    assert engine.bad == set()
    assert torch.equal(engine.ranks[1].page(20), engine.ranks[0].page(20))
    for number in range(6):
        engine.store(f"more{number}")
    assert engine.found("a") == 0


@pytest.mark.parametrize("then", ["a", "b", "ba"])
def test_a_read_that_a_reset_overtook_takes_nothing_else(
    make: Make, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Its pages hold something else by then; of the same key under the new name it is as good."""
    engine = make(room=3)
    engine.store("a")
    held = Held(engine, monkeypatch)
    engine.apply(engine.begin_load("a", block=20))
    assert held.reading.wait(20)
    until = time.monotonic() + PATIENCE
    while engine.ranks[0].worker._loads._running:  # the first rank's own read is not overtaken
        assert time.monotonic() < until
        time.sleep(0.002)
    engine.scheduler.reset()
    untouched = engine.ranks[1].page(20).clone()
    place = engine.arena.places(engine.arena.keys())[0][1]
    for number, name in enumerate(then):
        engine.compute(name, block=8 + number * BLOCKS)
        until_kept(engine, number + 1)
    assert engine.arena.places(engine.arena.keys())[0][1] == place
    held.go_on.set()
    engine.settle()
    wrong = then[0] == "b"
    assert engine.bad == (set(range(20, 20 + BLOCKS)) if wrong else set())
    expected = untouched if wrong else engine.ranks[0].page(8)
    assert torch.equal(engine.ranks[1].page(20), expected)
    # What was stored since is as good as it was, of the same key as well.
    for number, name in enumerate(then):
        assert engine.load(name, block=30) == set()
        assert torch.equal(engine.ranks[1].page(30), engine.ranks[0].page(8 + number * BLOCKS))


@pytest.mark.parametrize("wrong", ["other", "beyond", "none", "shorter"])
def test_a_wrong_place_is_a_miss(make: Make, wrong: str) -> None:
    engine = make()
    engine.store("a")
    engine.store("b", block=8)
    places = {key: place for key, place in engine.arena.places(engine.arena.keys())}
    step = engine.begin_load("a", block=20)
    (item,) = step.loads[0].items
    other = next(place for key, place in places.items() if key != item.key)
    item.place = {
        "other": other,
        "beyond": 1 << 62 | 4096,
        "none": None,
        "shorter": places[item.key] - 100,
    }[wrong]
    engine.apply(step)
    engine.settle()
    assert engine.bad == set(range(20, 20 + BLOCKS))
    assert engine.found("a") == 0
    assert engine.found("b") == CHUNK


def test_a_restart_offers_what_the_first_rank_finds(make: Make, tmp_path: Path) -> None:
    engine = make(tmp_path)
    engine.store("a", chunks=2)
    assert engine.written(2) == 2
    engine.close()
    again = make(tmp_path)
    assert again.load("a", block=20, chunks=2) == set()
    for offset in range(2 * BLOCKS):
        page = engine.ranks[0].page(offset)
        assert all(torch.equal(rank.page(20 + offset), page) for rank in again.ranks)
    # What was read is not written again.
    assert again.counters()["disk_written_chunks"] == 0


def test_a_restart_offers_what_each_rank_finds(make: Make, tmp_path: Path) -> None:
    engine = make(tmp_path, one_copy=False)
    engine.store("a", chunks=2)
    until_files(engine, tmp_path, 4)
    engine.close()
    again = make(tmp_path, one_copy=False)
    assert again.load("a", block=20, chunks=2) == set()
    for old, new in zip(engine.ranks, again.ranks, strict=True):
        assert old.codec.identity == new.codec.identity
        assert all(torch.equal(new.page(20 + n), old.page(n)) for n in range(2 * BLOCKS))


class StartsOtherwise(TwoRanks):
    """One rank starts with other weights than the same files give the same engine elsewhere."""

    changed = 0

    def both(self, call: Any) -> list[Any]:
        if not hasattr(self, "bad"):  # before the first name is made
            torch.nn.init.zeros_(self.ranks[self.changed].model.weight)
        return super().both(call)


@pytest.mark.parametrize("one_copy", [True, False])
@pytest.mark.parametrize("changed", [0, 1])
def test_other_weights_on_one_rank_are_another_name_of_every_rank(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: int, one_copy: bool
) -> None:
    """What a rank keeps was computed by the weights of all."""
    engine = make(tmp_path, one_copy=one_copy)
    engine.store("a")
    until_files(engine, tmp_path, 1 if one_copy else 2)
    engine.close()
    monkeypatch.setattr(StartsOtherwise, "changed", changed)
    again = StartsOtherwise(tmp_path, one_copy=one_copy)
    try:
        for old, new in zip(engine.ranks, again.ranks, strict=True):
            assert old.codec.identity != new.codec.identity
        assert again.found("a") == 0
        again.store("a", block=8)
        # Beside the others, which stay: of no rank is one in the place of another.
        until_files(again, tmp_path, 2 if one_copy else 4)
    finally:
        again.close()


@pytest.mark.parametrize("changed", [0, 1])
def test_a_chunk_put_off_needs_the_weights_of_both_steps(make: Make, changed: int) -> None:
    """Of the one that completed it, too, although they are right again when it is stored."""
    engine = make()
    item = StoreItem(RecordKey(b"k"), 0, list(range(BLOCKS)))
    weight = engine.ranks[changed].model.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    kept = StepMetadata(number=1, tokens=1, kept=[item])
    engine.both(lambda rank: rank.turn(kept))
    with torch.no_grad():
        weight.copy_(original)
    due = StepMetadata(number=2, tokens=1, stage_first=[item])
    reports = [report for _, _, report in engine.both(lambda rank: rank.turn(due))]
    until = time.monotonic() + PATIENCE
    while not all(report and (report.stored or report.dropped) for report in reports):
        assert time.monotonic() < until
        more = engine.both(lambda rank: rank.turn(StepMetadata(number=3)))
        for number, (_, _, report) in enumerate(more):
            before = reports[number]
            if report is not None:
                reports[number] = report if before is None else before.aggregate(report)
    told = {number: report for number, report in enumerate(reports) if report is not None}
    assert told[changed].dropped == [(b"k", changed)]
    assert [key for key, _, _ in told[1 - changed].stored] == [b"k"]


@pytest.mark.parametrize("one_name", [True, False])
def test_names_of_all_ranks_depend_on_each(one_name: bool) -> None:
    parts = {"weights": [b"a" * 16, b"b" * 16], "identity": [b"c" * 16, b"d" * 16]}
    meetings = []

    def name(ranks: int = 2, generation: bytes = b"") -> bytes:
        def gather(own: bytes) -> list[bytes]:
            meetings.append(own)
            return [w + i for w, i in zip(*parts.values(), strict=True)][:ranks]

        codec = type("Codec", (), {"identity": b""})()
        Names([codec], gather=gather, one_name=one_name).rename(generation)  # type: ignore[list-item]
        return bytes(codec.identity)

    names = {name(), name(ranks=1)}
    parts["identity"][1] = b"e" * 16  # which the rank's weights are in
    names.add(name())
    assert [len(found) for found in names] == [16] * 3
    # A generation is of this engine alone: stages of a pipeline are not in one step together.
    meetings.clear()
    name(generation=b"nonce")
    assert bool(meetings) == one_name


def test_bounds_are_whole_pages(make: Make) -> None:
    engine = make()
    engine.compute("a")
    assert engine.scheduler.index.used % PAGE == 0
    assert page_bytes(1) == PAGE
    assert BLOCK * BLOCKS == CHUNK
