"""Looks and touches go past writes that wait; what was lost is told in pieces."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import xxhash

from kvtc_vllm.offload import disk_asides
from kvtc_vllm.offload.disk_asides import DiskAsides
from kvtc_vllm.offload.disk_losses import DiskLosses
from kvtc_vllm.offload.disk_news import DiskNews
from kvtc_vllm.offload.disk_worker import DiskWorker
from kvtc_vllm.offload.namespace import Namespace
from kvtc_vllm.tiers.blob_store import Blob
from kvtc_vllm.tiers.disk import DiskError, DiskStore
from kvtc_vllm.tiers.keys import RecordKey
from tests.reliability.blobs import NAMESPACE, OTHER_NAMESPACE, blob_of, key_of

KEYS = [RecordKey(key_of(number)) for number in range(8)]


def namespace(root: Path, name: bytes = NAMESPACE) -> Namespace:
    return Namespace(partial(DiskStore, root, name, capacity=1 << 20, min_free=0))


def wait_until(happened: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.002)


def in_steps(
    side: DiskWorker, take: Callable[[DiskNews], list[RecordKey]], number: int
) -> list[list[RecordKey]]:
    """What each step is told, until it is so many keys in all."""
    steps: list[list[RecordKey]] = []

    def step() -> bool:
        steps.append(take(side.take_news()))
        return sum(map(len, steps)) >= number

    wait_until(step)
    return steps


@pytest.fixture
def side(tmp_path: Path) -> Iterator[DiskWorker]:
    """With all keys on disk, and both writers held up."""
    made = DiskWorker(namespace(tmp_path), 2, 5.0, 1 << 20)
    for key in KEYS:
        made.write(key, blob_of(key), 0)
    in_steps(made, lambda news: [key for key, _ in news.stored], len(KEYS))
    gate = threading.Event()
    for _ in range(2):
        made._writers.submit(partial(gate.wait, 30), 30)
    made.write(RecordKey(key_of(99)), blob_of(key_of(99)), 0)
    yield made
    gate.set()
    made.close((), 5)


def test_what_others_remove_is_learnt_while_writes_wait(side: DiskWorker, tmp_path: Path) -> None:
    namespace(tmp_path).remove(KEYS[2:4])
    steps = in_steps(side, lambda news: news.lost, 2)
    assert sorted(key for step in steps for key in step) == sorted(KEYS[2:4])


def test_chunks_are_marked_as_used_while_writes_wait(side: DiskWorker, tmp_path: Path) -> None:
    replica = namespace(tmp_path).store
    side.touch([KEYS[5], KEYS[4]])
    side.touch([KEYS[5]])
    wait_until(lambda: [entry.key for entry in replica.scan()][-2:] == [KEYS[4], KEYS[5]])


def test_many_losses_are_told_in_pieces(side: DiskWorker, tmp_path: Path) -> None:
    """60,000 in one step would take the scheduler a fifth of a second."""
    side._told_at_once = 2
    namespace(tmp_path).remove(KEYS[:5])
    steps = in_steps(side, lambda news: news.lost, 5)
    assert max(map(len, steps)) == 2
    assert sorted(key for step in steps for key in step) == sorted(KEYS[:5])


def told(lost: DiskLosses, most: int, *failed: RecordKey) -> list[RecordKey]:
    news = DiskNews(failed=list(failed))
    lost.tell(news, most)
    return news.lost


def test_a_loss_that_a_read_met_is_told_with_it() -> None:
    lost = DiskLosses()
    lost.add(KEYS)
    assert told(lost, 2, KEYS[6], KEYS[7], KEYS[6], RecordKey(b"?")) == [KEYS[6], KEYS[7]]
    assert told(lost, 2) == KEYS[:2]
    assert told(lost, 1, KEYS[4], KEYS[5]) == KEYS[4:6]
    assert told(lost, 9) == KEYS[2:4]
    assert told(lost, 9) == []


def test_what_is_written_again_before_its_loss_is_told_is_not_lost() -> None:
    lost = DiskLosses()
    lost.add(KEYS[:3])
    for key in (KEYS[1], KEYS[5]):
        with lost.writing(key):
            pass
    assert told(lost, 9) == [KEYS[0], KEYS[2]]


def test_what_is_being_written_is_lost_only_if_that_fails() -> None:
    lost = DiskLosses()
    with lost.writing(KEYS[0]):
        lost.add(KEYS[:2])
        with lost.looking() as gone:
            gone += KEYS[:3]
        assert told(lost, 9) == KEYS[1:3]
    assert told(lost, 9) == []
    for seen in (KEYS[:1], []):
        with suppress(DiskError), lost.writing(KEYS[0]):
            lost.add(seen)
            raise DiskError("full", "no room")
        assert told(lost, 9) == seen


def test_what_is_written_while_a_look_is_under_way_is_not_lost() -> None:
    lost = DiskLosses()

    with lost.looking() as gone:
        with lost.writing(KEYS[1]):
            pass
        gone += KEYS[:3]
    assert told(lost, 9) == [KEYS[0], KEYS[2]]
    with suppress(DiskError), lost.reading(KEYS[0]), lost.reading(KEYS[1]):
        with lost.writing(KEYS[1]):
            pass
        raise DiskError("missing", "it is not there")
    assert told(lost, 9) == KEYS[:1]


class Smaller:
    """Halves any blob, once."""

    most_times = 1

    def times_halved(self, blob: Blob) -> int:
        return 1

    def halve(self, blob: Blob, key: bytes) -> bytes:
        content = bytes(blob)[: len(blob) - 17]
        return content + xxhash.xxh3_128_digest(content)


def test_a_look_while_a_smaller_chunk_takes_the_place_of_another_tells_no_loss(
    tmp_path: Path,
) -> None:
    """With two threads one in eight was told as lost, and its new file removed."""
    place = namespace(tmp_path)
    side = DiskWorker(place, 2, 5.0, 1 << 20)
    side.write(KEYS[0], blob_of(KEYS[0]), 0)
    in_steps(side, lambda news: [key for key, _ in news.stored], 1)
    store = place.store
    write = store.write

    def slowly(key: RecordKey, blob: Blob) -> int:
        store.remove([key])  # as `write` does, before it publishes the other
        side._note_removed(place, 0)
        side.read([key])
        assert side._readers.wait_idle(20)
        return write(key, blob)

    store.write = slowly  # type: ignore[assignment, method-assign]
    side.halve([KEYS[0]], Smaller())
    lost: list[RecordKey] = []

    def halved(news: DiskNews) -> list[RecordKey]:
        lost.extend(news.lost)
        return [one.key for one in news.halved if one.size is not None]

    in_steps(side, halved, 1)
    assert side.take_news().lost + lost == []
    assert [entry.key for entry in store.scan()] == KEYS[:1]
    side.close((), 5)


class Calls:
    """Asides whose calls wait for `gate`."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.touched: list[tuple[Namespace, list[RecordKey]]] = []
        self.looks = 0
        self.errors: list[Exception] = []
        self.raises: Exception | None = None
        self.asides = DiskAsides(self._touch, self._look, self.errors.append)

    def _touch(self, place: Namespace, keys: Sequence[RecordKey]) -> None:
        self.gate.wait(30)
        self.touched.append((place, list(keys)))
        self._fail()

    def _look(self) -> None:
        self.gate.wait(30)
        self.looks += 1
        self._fail()

    def _fail(self) -> None:
        if self.raises is not None:
            raise self.raises

    def release(self) -> None:
        self.gate.set()
        assert self.asides.wait_idle(20)


@pytest.fixture
def calls() -> Iterator[Calls]:
    made = Calls()
    yield made
    made.gate.set()
    made.asides.close()


def test_one_look_waits_and_one_call_takes_all_keys(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_asides, "TOUCHED_AT_ONCE", 3)
    place = namespace(tmp_path)
    calls.asides.look()
    wait_until(lambda: not calls.asides._looks._waiting)
    for number in range(200):
        calls.asides.look()
        calls.asides.touch(place, [KEYS[number % 4], KEYS[number % 2]])
    calls.release()
    assert calls.looks == 2
    assert calls.touched == [(place, [KEYS[2], KEYS[0], KEYS[3]]), (place, [KEYS[1]])]


def test_keys_of_a_namespace_that_was_left_are_not_touched_in_the_next(
    calls: Calls, tmp_path: Path
) -> None:
    first, second = namespace(tmp_path), namespace(tmp_path, OTHER_NAMESPACE)
    calls.asides.look()
    calls.asides.touch(first, KEYS[:2])
    calls.asides.touch(second, KEYS[2:3])
    calls.release()
    assert calls.touched == [(second, KEYS[2:3])]


def test_whatever_a_call_raises_is_told_and_the_next_is_made(calls: Calls, tmp_path: Path) -> None:
    calls.gate.set()
    for calls.raises in (RecursionError(), DiskError("io", "broken")):
        calls.asides.touch(namespace(tmp_path), KEYS[:1])
        calls.release()
        calls.asides.look()
        calls.release()
    assert [type(error) for error in calls.errors] == [RecursionError, RecursionError, DiskError]
    assert (len(calls.touched), calls.looks) == (2, 2)


def test_on_a_hung_disk_touches_are_refused_and_keys_do_not_pile_up(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_asides, "ASIDE_SECONDS", 0.05)
    calls.asides.look()
    wait_until(lambda: calls.asides._pool.stalled)
    for _ in range(3):
        calls.asides.touch(namespace(tmp_path), KEYS)
        calls.asides.look()
    assert [error.reason for error in calls.errors] == ["stalled"] * 3  # type: ignore[attr-defined]
    assert not calls.asides._keys
    monkeypatch.setattr(disk_asides, "ASIDE_SECONDS", 20.0)
    calls.release()
    place = namespace(tmp_path)
    calls.asides.touch(place, KEYS[:1])
    calls.release()
    assert calls.touched == [(place, KEYS[:1])]
