"""A worker's side of the disk: nothing blocks, nothing old survives, faults are misses."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtc_vllm.codec.errors import CONTAINER_REASONS
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.config import load_config
from kvtc_vllm.connector.torch_transfer import TorchTransfer
from kvtc_vllm.offload import disk_worker as disk_module
from kvtc_vllm.offload import namespace as namespace_module
from kvtc_vllm.offload.disk_news import DiskNews
from kvtc_vllm.offload.disk_worker import DiskWorker
from kvtc_vllm.offload.geometry import codec_geometry
from kvtc_vllm.offload.messages import LoadItem, LoadJob, StepMetadata, StoreItem
from kvtc_vllm.offload.names import Names
from kvtc_vllm.offload.namespace import Namespace, open_in_time
from kvtc_vllm.offload.stats import Stats
from kvtc_vllm.offload.worker import KVTCWorker
from kvtc_vllm.tiers.disk import DISK_REASONS, DiskError, DiskStore, FileSystem
from kvtc_vllm.tiers.disk import store as disk_store
from kvtc_vllm.tiers.disk.layout import LIST_FILE
from kvtc_vllm.vllm_cache.layout import PagedLayout
from tests.connector.fakes import BLOCK, geometry
from tests.reliability import disk as on_disk
from tests.reliability.blobs import NAMESPACE, OTHER_NAMESPACE, blob_of, key_of
from tests.reliability.faults import (
    FAULTS,
    FaultyFileSystem,
    HangingFileSystem,
    WrappedFileSystem,
)

KEYS = [key_of(number) for number in range(8)]
DEADLINE = 1.0
PATIENCE = 60.0
"""Seconds that a session with a fault may wait for what comes without a fault: a busy machine has
stopped one for longer than 20."""
AT_ONCE = 0.3
"""Seconds that a call of the engine's thread may take: a pause of a busy machine, but no wait
for a disk; one that hangs takes far longer."""


class Timed:
    """Forwards calls and remembers the slowest."""

    def __init__(self, side: DiskWorker) -> None:
        self._side = side
        self.slowest = 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._side, name)
        if name[0] == "_":
            return method

        def call(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args)
            finally:
                if name not in ("close", "inventory"):
                    self.slowest = max(self.slowest, time.perf_counter() - began)

        return call


def open_side(
    root: Path,
    filesystem: FileSystem | None = None,
    threads: int = 2,
    queue_bytes: int = 1 << 20,
    capacity: int = 1 << 20,
) -> Any:
    made = namespace(root, filesystem=filesystem, capacity=capacity)
    open_in_time(made)
    return Timed(DiskWorker(made, threads, DEADLINE, queue_bytes))


def namespace(
    root: Path,
    name: bytes = NAMESPACE,
    own: bool = False,
    filesystem: FileSystem | None = None,
    capacity: int = 1 << 20,
    lock_wait_seconds: float = 0.2,
) -> Namespace:
    make = partial(
        DiskStore,
        root,
        name,
        capacity=capacity,
        min_free=0,
        filesystem=filesystem,
        lock_wait_seconds=lock_wait_seconds,
    )
    return Namespace(make, own)


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Any]:
    made = open_side(tmp_path)
    yield made
    made.close((), 5)


def gather(side: Any, enough: Callable[[DiskNews], bool], seconds: float = 20) -> DiskNews:
    """News until there is enough of them."""
    total = DiskNews()
    ends = time.monotonic() + seconds
    while not enough(total):
        assert time.monotonic() < ends, total
        news = side.take_news()
        total.stored += news.stored
        total.found += news.found
        total.read += news.read
        total.failed += news.failed
        total.lost += news.lost
        total.errors += news.errors
        total.written_bytes += news.written_bytes
        total.repairs += news.repairs
        time.sleep(0.002)
    return total


def write(side: Any, *keys: bytes, epoch: int = 0) -> DiskNews:
    for key in keys:
        side.write(key, blob_of(key), epoch)
    return gather(side, lambda news: len(news.stored) == len(keys))


def on_other_thread(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_write_read_touch_remove(side: Any, tmp_path: Path) -> None:
    news = write(side, *KEYS[:3])
    assert sorted(key for key, _ in news.stored) == sorted(KEYS[:3])
    assert news.written_bytes == sum(len(blob_of(key)) for key in KEYS[:3])
    side.touch([KEYS[1], KEYS[0]])
    side.read([KEYS[0], KEYS[5]])
    news = gather(side, lambda news: bool(news.read and news.failed))
    assert news.read == [(KEYS[0], blob_of(KEYS[0]))]
    assert news.failed == news.lost == [KEYS[5]]
    assert news.errors == {"missing": 1}
    side.remove([KEYS[2]])
    side.touch([KEYS[2]])  # may come before or after the removal
    while len(on_disk.chunk_files(tmp_path)) > 2:
        time.sleep(0.002)
    assert [key for key, _ in side.inventory()] == [KEYS[1], KEYS[0]]


def test_every_reason_has_a_counter_and_nothing_else_is_counted() -> None:
    """What errors may say is checked by types; a word that is not published is an error here."""
    stats = Stats()
    for error in DISK_REASONS:
        stats.add("disk_errors", label=error)
    for reason in CONTAINER_REASONS:
        stats.add("failed_loads", label=reason)
    assert len(stats.data) == len(DISK_REASONS) + len(CONTAINER_REASONS)
    for name, label in (("disk_errors", "new"), ("new", None), ("failed_loads", "full")):
        with pytest.raises(KeyError, match="not a metric of ours"):
            stats.add(name, label=label)


def test_one_write_a_chunk_at_a_time(tmp_path: Path) -> None:
    filesystem = HangingFileSystem("truncate")
    side = open_side(tmp_path, filesystem)
    for _ in range(5):
        side.write(KEYS[0], blob_of(KEYS[0]), 0)
    assert side._writers.waiting <= 1
    filesystem.release()
    gather(side, lambda news: len(news.stored) == 1)
    side.close((), 5)


def test_blobs_that_wait_are_bounded_by_their_bytes(tmp_path: Path) -> None:
    sizes = [len(blob_of(key)) for key in KEYS]
    filesystem = HangingFileSystem("truncate")
    side = open_side(tmp_path, filesystem, queue_bytes=sum(sizes[:3]))
    for key in KEYS[:3]:
        side.write(key, blob_of(key), 0)
    side.write(KEYS[3], blob_of(KEYS[3]), 0)
    assert side.take_news().errors == {"queue_full": 1}
    filesystem.release()
    gather(side, lambda news: len(news.stored) == 3)
    while side._queued:
        time.sleep(0.002)
    write(side, KEYS[3])
    side.close((), 5)


def test_writes_that_no_thread_took_in_time_are_counted_and_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "WRITE_SECONDS", 0.5)
    filesystem = HangingFileSystem("truncate")
    side = open_side(tmp_path, filesystem, threads=1)
    for key in KEYS[:4]:
        side.write(key, blob_of(key), 0)
    time.sleep(0.7)
    side.write(KEYS[4], blob_of(KEYS[4]), 0)
    assert side.take_news().errors == {"stalled": 1}
    filesystem.release()
    news = gather(side, lambda news: bool(news.stored) and news.errors["deadline"] == 3)
    assert [key for key, _ in news.stored] == KEYS[:1]
    assert side._queued == 0
    assert not side._writing
    write(side, KEYS[4])
    side.close((), 5)


# ------------------------------------------------------------------------ a hung disk


def test_a_hung_disk_blocks_nobody_and_reads_fail_at_the_deadline(tmp_path: Path) -> None:
    filesystem = HangingFileSystem("pread")
    filesystem.hang = False
    side = open_side(tmp_path, filesystem)
    write(side, *KEYS)
    filesystem.hang = True
    began = time.monotonic()
    side.read(KEYS)
    failed = gather(side, lambda news: len(news.failed) == len(KEYS))
    took = time.monotonic() - began
    assert DEADLINE <= took <= DEADLINE * 1.1 + 0.1
    assert failed.errors["deadline"] + failed.errors["stalled"] == len(KEYS)
    assert failed.lost == []  # it may be back tomorrow
    began = time.monotonic()
    side.read(KEYS[:2])
    news = side.take_news()
    assert (news.failed, news.errors) == (KEYS[:2], {"stalled": 2})
    for key in KEYS:  # writes read back what they wrote, so they hang as well
        side.write(key + b"x", blob_of(key + b"x"), 0)
    side.touch(KEYS)
    side.remove(KEYS[:1])
    side.leave(1)
    side.enter(namespace(tmp_path, OTHER_NAMESPACE, filesystem=filesystem))
    side.take_news()
    assert time.monotonic() - began < 10 * AT_ONCE
    assert side.slowest < AT_ONCE
    began = time.monotonic()
    side.close(iter([(key, blob_of(key)) for key in KEYS]), 0.3)
    assert time.monotonic() - began < 3
    filesystem.release()


def test_reads_behind_a_hang_do_not_wait_for_their_own_deadline(tmp_path: Path) -> None:
    filesystem = HangingFileSystem("pread")
    filesystem.hang = False
    side = open_side(tmp_path, filesystem, threads=1)
    write(side, *KEYS[:2])
    filesystem.hang = True
    began = time.monotonic()
    side.read(KEYS[:1])
    time.sleep(DEADLINE * 0.8)
    side.read(KEYS[1:2])
    news = gather(side, lambda news: len(news.failed) == 2)
    assert time.monotonic() - began < DEADLINE * 1.1 + 0.1
    assert news.errors == {"deadline": 1, "stalled": 1}
    filesystem.release()


def test_after_a_hang_the_disk_serves_again(tmp_path: Path) -> None:
    filesystem = HangingFileSystem("pread")
    filesystem.hang = False
    side = open_side(tmp_path, filesystem)
    write(side, *KEYS[:2])
    filesystem.hang = True
    side.read(KEYS[:2])
    gather(side, lambda news: len(news.failed) == 2)
    filesystem.release()
    while side._readers.hung:
        time.sleep(0.002)
    side.read(KEYS[:2])
    assert len(gather(side, lambda news: len(news.read) == 2).failed) == 0
    side.close((), 5)


class NoListing(WrappedFileSystem):
    """Directories can't be read while `broken`."""

    broken = False

    def perform(self, number: int, name: str, real: Any, args: Any) -> Any:
        if self.broken and name == "list":
            raise OSError(errno.EIO, "no")
        return real(*args)


def test_a_listing_that_fails_starts_empty(tmp_path: Path) -> None:
    filesystem = NoListing()
    side = open_side(tmp_path, filesystem)
    filesystem.broken = True
    assert list(side.inventory()) == []
    assert side.take_news().errors == {"io": 1}
    side.close((), 5)


def test_a_disk_that_hangs_at_the_start_does_not_hold_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (disk_module, namespace_module):
        monkeypatch.setattr(module, "START_SECONDS", 0.1)
    filesystem = HangingFileSystem("list")
    filesystem.hang = False
    side = open_side(tmp_path, filesystem)
    filesystem.hang = True
    assert list(side.inventory()) == []
    filesystem.release()
    side.close((), 5)
    again = HangingFileSystem("mkdir")
    with pytest.raises(DiskError, match="deadline"):
        open_in_time(namespace(tmp_path, filesystem=again))
    again.release()


# ---------------------------------------------------------------------------- a reset


def wait_until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.002)


def other(key: bytes) -> bytes:
    return blob_of(key, OTHER_NAMESPACE)


def test_what_other_processes_remove_is_learnt_without_a_read(side: Any, tmp_path: Path) -> None:
    write(side, *KEYS[:4])
    replica = namespace(tmp_path).store
    replica.remove(KEYS[1:3])
    news = gather(side, lambda news: len(news.lost) == 2)
    assert sorted(news.lost) == sorted(KEYS[1:3])
    another = namespace(tmp_path, OTHER_NAMESPACE, capacity=1 << 15).store
    for key in KEYS:  # whose cap is smaller, so that all others go
        another.write(key, blob_of(key, OTHER_NAMESPACE))
    news = gather(side, lambda news: len(news.lost) == 2)
    assert sorted(news.lost) == sorted([KEYS[0], KEYS[3]])


def test_repairs_are_told(side: Any, tmp_path: Path) -> None:
    write(side, KEYS[0])
    for _ in range(2):
        (tmp_path / "ledger.json").write_bytes(b"x")
        write(side, KEYS[1])
        side.remove([KEYS[1]])
        gather(side, lambda news: KEYS[1] in news.lost)
    (tmp_path / "ledger.json").write_bytes(b"x")
    side.remove([KEYS[0]])
    assert gather(side, lambda news: news.repairs > 0).repairs >= 1


@pytest.mark.parametrize("error", [RecursionError(), UnicodeDecodeError("utf-8", b"", 0, 1, "")])
def test_an_exception_that_no_store_declares_is_counted_and_logged_all_the_same(
    error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    side = open_side(tmp_path)
    write(side, KEYS[0])

    def fail(*_: object) -> None:
        raise error

    store = side._namespace.store
    store.read = store.write = store.touch = store.remove = fail
    side.read([KEYS[0]])
    side.write(KEYS[1], blob_of(KEYS[1]), 0)
    side.touch([KEYS[0]])
    side.remove([KEYS[0]])
    news = gather(side, lambda news: news.errors["other"] == 4)
    assert news.failed == [KEYS[0]]
    assert "the disk tier failed" in caplog.text
    side.close((), 5)


def test_a_reset_leaves_files_to_others_and_reads_none_of_them(side: Any, tmp_path: Path) -> None:
    write(side, *KEYS[:2])
    side.write(KEYS[2], blob_of(KEYS[2]), 0)  # its news are not taken
    wait_until(lambda: len(on_disk.chunk_files(tmp_path)) == 3)
    side.leave(1)
    side.write(KEYS[3], blob_of(KEYS[3]), 1)  # nowhere to go yet
    side.enter(namespace(tmp_path, OTHER_NAMESPACE))
    side.read(KEYS[:1])
    news = gather(side, lambda news: bool(news.failed))
    assert (news.stored, news.read, news.lost) == ([], [], KEYS[:1])
    side.write(KEYS[0], other(KEYS[0]), 1)
    gather(side, lambda news: bool(news.stored))
    side.read(KEYS[:1])
    assert gather(side, lambda news: bool(news.read)).read == [(KEYS[0], other(KEYS[0]))]
    again = open_side(tmp_path)
    assert sorted(key for key, _ in again.inventory()) == sorted(KEYS[:3])
    again.close((), 5)


def test_what_a_namespace_holds_already_is_told_when_it_is_entered(
    side: Any, tmp_path: Path
) -> None:
    store = DiskStore(tmp_path, OTHER_NAMESPACE, capacity=1 << 20, min_free=0)
    store.write(KEYS[4], other(KEYS[4]))
    store.close()
    side.leave(1)
    side.enter(namespace(tmp_path, OTHER_NAMESPACE))
    news = gather(side, lambda news: bool(news.found))
    assert [key for key, _ in news.found] == KEYS[4:5]
    assert news.stored == []


def test_what_is_found_is_told_in_pieces_and_never_after_later_news(
    side: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million chunks in one step would take the scheduler seconds."""
    side._side._told_at_once = 2
    store = DiskStore(tmp_path, OTHER_NAMESPACE, capacity=1 << 20, min_free=0)
    for key in KEYS[:5]:
        store.write(key, other(key))
    side.leave(1)
    side.take_news()
    side.enter(namespace(tmp_path, OTHER_NAMESPACE))
    wait_until(lambda: not side._side._found.told)
    assert [key for key, _ in side.take_news().found] == KEYS[:2]
    store.remove(KEYS[3:4])
    store.close()
    side._side._note_removed(side._side._namespace, 1)  # found out before the next piece is told
    news = side.take_news()
    assert (news.lost, [key for key, _ in news.found]) == (KEYS[3:4], KEYS[2:3])
    assert [key for key, _ in side.take_news().found] == KEYS[4:5]
    assert (side.take_news().found, side._side._found.told) == ([], True)


def test_a_namespace_that_nobody_else_can_name_goes_with_its_generation(tmp_path: Path) -> None:
    side = open_side(tmp_path)
    write(side, KEYS[0])
    side.leave(1)
    side.enter(namespace(tmp_path, OTHER_NAMESPACE, own=True))
    side.write(KEYS[1], other(KEYS[1]), 1)
    gather(side, lambda news: bool(news.stored))
    side.leave(2)
    wait_until(lambda: not (tmp_path / OTHER_NAMESPACE.hex()).exists())
    side.enter(namespace(tmp_path, bytes(16), own=True))
    side.write(KEYS[1], blob_of(KEYS[1], bytes(16)), 2)
    gather(side, lambda news: bool(news.stored))
    side.close([(KEYS[2], blob_of(KEYS[2], bytes(16)))], 5)
    assert [path.parent.parent.name for path in on_disk.chunk_files(tmp_path)] == [NAMESPACE.hex()]


@pytest.mark.parametrize("call", ["truncate", "rename", "utime"])
def test_a_write_under_way_at_a_reset_tells_nothing_and_holds_nobody_up(
    tmp_path: Path, call: str
) -> None:
    """Hanging before, in the middle of, and after its publication. It is right where it is."""
    filesystem = HangingFileSystem(call)
    filesystem.hang = False
    patient: dict[str, Any] = {"filesystem": filesystem, "lock_wait_seconds": 20.0}
    first = namespace(tmp_path, **patient)
    open_in_time(first)
    side = Timed(DiskWorker(first, 2, DEADLINE, 1 << 20))
    filesystem.calls.clear()
    filesystem.hang = True
    side.write(KEYS[0], blob_of(KEYS[0]), 0)
    wait_until(lambda: call in filesystem.calls)
    side.leave(1)
    side.enter(namespace(tmp_path, OTHER_NAMESPACE, **patient))
    side.write(KEYS[0], other(KEYS[0]), 1)
    filesystem.release()
    wait_until(lambda: not side._writing)
    assert len(gather(side, lambda news: bool(news.stored)).stored) == 1
    side.read(KEYS[:1])
    assert gather(side, lambda news: bool(news.read)).read == [(KEYS[0], other(KEYS[0]))]
    side.close((), 5)


def test_an_encoder_that_comes_late_writes_nothing(side: Any, tmp_path: Path) -> None:
    """It began before the reset, and calls after it."""
    side.leave(1)
    side.enter(namespace(tmp_path, OTHER_NAMESPACE))
    side.write(KEYS[0], blob_of(KEYS[0]), 0)
    side.write(KEYS[1], other(KEYS[1]), 1)
    gather(side, lambda news: bool(news.stored))
    assert len(on_disk.chunk_files(tmp_path)) == 1


def test_reads_under_way_at_a_reset_are_forgotten(tmp_path: Path) -> None:
    filesystem = HangingFileSystem("pread")
    filesystem.hang = False
    side = open_side(tmp_path, filesystem)
    write(side, KEYS[0])
    filesystem.hang = True
    side.read(KEYS[:1])
    side.leave(1)
    filesystem.release()
    time.sleep(0.05)
    news = side.take_news()
    assert (news.read, news.failed) == ([], [])
    side.close((), 5)


def test_a_namespace_that_cannot_be_opened_after_a_reset_is_tried_again(
    side: Any, tmp_path: Path
) -> None:
    blocked = tmp_path / OTHER_NAMESPACE.hex()
    blocked.mkdir()
    blocked.chmod(0o777)  # others may write it, so it is not used
    side.leave(1)
    side.enter(namespace(tmp_path, OTHER_NAMESPACE))
    side.write(KEYS[0], other(KEYS[0]), 1)
    assert gather(side, lambda news: news.errors.total() >= 2).stored == []
    blocked.chmod(0o700)
    side.write(KEYS[1], other(KEYS[1]), 1)
    gather(side, lambda news: len(news.stored) == 1)


# ------------------------------------------------------------------------- the end


def test_the_end_writes_what_waits_and_what_is_given(tmp_path: Path) -> None:
    side = open_side(tmp_path, threads=3)
    for key in KEYS[:4]:
        side.write(key, blob_of(key), 0)
    descriptors = on_disk.open_descriptors()
    many = [key_of(number) for number in range(100, 160)]
    side.close(((key, blob_of(key, longest=500)) for key in many), 20)
    assert len(on_disk.chunk_files(tmp_path)) == 64
    assert on_disk.temporaries(tmp_path) == []
    assert on_disk.open_descriptors() <= descriptors
    side.close((), 1)  # a second time does nothing
    store = DiskStore(tmp_path, NAMESPACE, capacity=1 << 20, min_free=0)
    assert store.read(many[-1]) == blob_of(many[-1], longest=500)
    store.close()


def test_the_end_waits_for_a_slow_writer(tmp_path: Path) -> None:
    """The store must not be closed under a thread that still writes."""
    filesystem = HangingFileSystem("truncate")
    side = open_side(tmp_path, filesystem)
    side.write(KEYS[0], blob_of(KEYS[0]), 0)
    threading.Timer(0.1, filesystem.release).start()
    side.close(iter([(KEYS[1], blob_of(KEYS[1]))]), 20)
    assert len(on_disk.chunk_files(tmp_path)) == 2
    assert on_disk.temporaries(tmp_path) == []


def test_the_end_is_on_time_although_there_is_more_to_write(tmp_path: Path) -> None:
    side = open_side(tmp_path, capacity=1 << 30)

    def endless() -> Iterator[tuple[bytes, bytes]]:
        number = 0
        while True:
            number += 1
            yield key_of(number), blob_of(key_of(number), longest=200)

    began = time.monotonic()
    side.close(endless(), 0.3)
    assert time.monotonic() - began < 3
    assert on_disk.chunk_files(tmp_path)


# ------------------------------------------------------- faults, through the connector

TINY = geometry(head_size=64)


def worker_over(root: Path, filesystem: FileSystem, capacity: int = 1 << 20) -> Any:
    """A `KVTCWorker` with the raw codec on a small paged cache and a disk below."""
    torch.manual_seed(0)
    caches = {
        name: torch.randn(16, 2, BLOCK, 128).to(torch.bfloat16)
        for name in TINY.only_group.layer_names
    }
    codec = RawCodec(codec_geometry(TINY.only_group), torch.bfloat16, NAMESPACE)
    place = namespace(root, NAMESPACE, False, filesystem, capacity, lock_wait_seconds=0.05)
    open_in_time(place)
    side = DiskWorker(place, 1, PATIENCE, 1 << 20)
    config = load_config({"codec": "raw", "memory_bytes": "4MiB", "disk_path": str(root)})
    layout = PagedLayout(caches, TINY.only_group)
    transfer = TorchTransfer(layout, codec, config.chunk_tokens)
    worker = KVTCWorker(config, TINY, [transfer], layout.device, 1 << 24, 0, Names([codec]), side)
    return worker, caches


def session(root: Path, filesystem: FileSystem) -> dict[str, float]:
    """Store two prompts, lose them from memory, promote and load them; returns counters.

    Every request ends well: its blocks are either right or reported for recomputation.
    """
    try:
        worker, caches = worker_over(root, filesystem)
    except DiskError:
        return {"refused": 1}  # at the start, with one clear line
    counters: dict[str, float] = {"loaded": 0, "missed": 0}

    def until(ready: Callable[[], bool]) -> None:
        ends = time.monotonic() + PATIENCE
        while not ready():
            assert time.monotonic() < ends, (settled, there, finished, counters, side._news)
            finished.update(worker.poll(idle=True))
            report = worker.take_report()
            if report is not None:
                settled.update(key for key, _, _ in report.stored)
                settled.update(key for key, _ in report.dropped)
                there.update(key for key, _, _ in report.stored)
                there.difference_update(report.bad)

    finished: set[str] = set()
    settled: set[bytes] = set()
    there: set[bytes] = set()
    keys = [b"a" * 32, b"b" * 32]
    blocks = {keys[0]: [1, 2, 3, 4], keys[1]: [5, 6, 7, 8]}
    expected = {key: [pages[blocks[key]].clone() for pages in caches.values()] for key in keys}
    side = worker._disk
    worker.inventory()
    for key in keys:
        step = StepMetadata(stores=[StoreItem(key, 0, blocks[key])])
        worker.begin_step(step)
        worker.store(step)
    until(lambda: settled >= set(keys))
    until(lambda: not side._writing)
    settled.clear()
    there.clear()
    worker.begin_step(StepMetadata(evict=keys, promote=keys, touch=keys))
    until(lambda: settled >= set(keys))
    for key in keys:
        if key not in there:
            counters["missed"] += 1
            continue
        items = [LoadItem(key, 0, 0, [10, 11, 12, 13])]
        finished.clear()
        worker.begin_step(StepMetadata(loads=[LoadJob("r", items)]))
        until(lambda: bool(finished))
        if worker.take_bad_blocks():
            counters["missed"] += 1
        else:
            counters["loaded"] += 1
            found = [pages[[10, 11, 12, 13]] for pages in caches.values()]
            assert all(map(torch.equal, found, expected[key])), "wrong values were served"
    worker.begin_step(StepMetadata(disk_remove=keys[:1]))
    until(lambda: side._writers.wait_idle(0))
    worker.shutdown()
    worker.poll(idle=False)
    stats = worker.take_stats()
    counters |= stats.data if stats is not None else {}
    return counters


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("EIO",), ("ENOSPC", "EMFILE", "EROFS", "EINTR")])
def test_a_fault_at_every_call_is_a_miss_with_a_counter(tmp_path: Path, kinds: list[str]) -> None:
    """The store's own tests have every kind at every call; here the kinds take turns."""
    counting = WrappedFileSystem()
    usual = session(tmp_path / "plain", counting)
    assert (usual["loaded"], usual["missed"]) == (2, 0)
    missed = 0
    for first, call in enumerate(counting.calls, 1):
        kind = kinds[first % len(kinds)]
        where = f"{kind} at call {first}: {call}"
        found = session(tmp_path / str(first), FaultyFileSystem(FAULTS[kind], first))
        if "refused" in found:
            continue
        assert found["loaded"] + found["missed"] == 2, where
        missed += int(found["missed"])
        if found["missed"]:
            assert any(name.startswith("disk_errors/") for name in found), where
    assert missed


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC"])
def test_a_disk_that_fails_for_good_misses_everything(tmp_path: Path, kind: str) -> None:
    counting = WrappedFileSystem()
    open_side(tmp_path / "plain", counting).close((), 5)
    filesystem = FaultyFileSystem(FAULTS[kind], len(counting.calls), lasting=True)
    found = session(tmp_path / "tier", filesystem)
    assert (found["loaded"], found["missed"]) == (0, 2)


# ------------------------------------------------------------ the list of files


def list_of(root: Path) -> Path:
    return root / NAMESPACE.hex() / LIST_FILE


def test_the_list_of_files_is_written_now_and_then_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_store, "LISTED_FROM", 1)
    side = open_side(tmp_path)
    side.write(key_of(1), blob_of(key_of(1)), 0)
    assert gather(side, lambda news: bool(news.stored)).errors == {}
    assert not list_of(tmp_path).exists()
    side.close((), 5)
    assert list_of(tmp_path).exists()
    list_of(tmp_path).unlink()
    monkeypatch.setattr(disk_module, "FIRST_LIST_SECONDS", 0.0)
    side = open_side(tmp_path)
    assert len(side.inventory()) == 1
    try:
        gather(side, lambda news: list_of(tmp_path).exists())
    finally:
        side.close((), 5)


def test_what_nobody_can_name_again_gets_no_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_store, "LISTED_FROM", 1)
    made = namespace(tmp_path, own=True)
    made.store.write(key_of(1), blob_of(key_of(1)))
    made.keep_list(time.monotonic() + 9)
    assert not list_of(tmp_path).exists()
    made.leave()
