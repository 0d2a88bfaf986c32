"""The worker side alone: staging, failures, resets, on a paged cache without a model."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.config import load_config
from kvtc_vllm.connector.sizing import divide
from kvtc_vllm.connector.torch_transfer import TorchTransfer
from kvtc_vllm.offload.adapters import LoadedAdapters
from kvtc_vllm.offload.disk_worker import DiskWorker
from kvtc_vllm.offload.geometry import codec_geometry
from kvtc_vllm.offload.halver import Halver
from kvtc_vllm.offload.messages import (
    NO_ADAPTER,
    AdapterUse,
    LoadItem,
    LoadJob,
    StepMetadata,
    StoreItem,
    WorkerReport,
)
from kvtc_vllm.offload.names import Names
from kvtc_vllm.offload.weights import WeightsWatch
from kvtc_vllm.offload.worker import KVTCWorker
from kvtc_vllm.tiers.blob_store import MemoryStore
from kvtc_vllm.tiers.memory import MemoryArena
from kvtc_vllm.vllm_cache.layout import PagedLayout
from tests.connector.fakes import BLOCK, FakeLora, geometry
from tests.connector.test_adapters import Manager, loaded

SHAPE = geometry(head_size=64)
GROUP = SHAPE.only_group
CHUNK_BYTES = 4 * BLOCK * SHAPE.token_bytes


class Rig:
    """A worker over random pages."""

    def __init__(
        self,
        codec: ChunkCodec | None = None,
        names: dict[str, Any] | None = None,
        memory: MemoryStore | None = None,
        disk: DiskWorker | None = None,
        halver: Halver | None = None,
        **extra: Any,
    ) -> None:
        self.caches = {
            name: torch.randn(40, 2, BLOCK, 128).to(torch.bfloat16) for name in GROUP.layer_names
        }
        self.codec = codec or RawCodec(codec_geometry(GROUP), torch.bfloat16)
        config = load_config({"codec": "raw", "memory_bytes": "1MiB", **extra})
        layout = PagedLayout(self.caches, GROUP)
        transfer = TorchTransfer(layout, self.codec, config.chunk_tokens)
        plan = divide(config.staging_capacity, 0, None)
        self.names = Names([self.codec], **(names or {}))
        self.names.rename(b"")
        self.worker = KVTCWorker(
            config,
            SHAPE,
            [transfer],
            layout.device,
            plan.staging,
            rank=0,
            names=self.names,
            disk=disk,
            memory=memory,
            halver=halver,
        )

    def store(self, key: bytes, blocks: list[int], start: int = 0, epoch: int = 0) -> None:
        step = StepMetadata(number=1, epoch=epoch, stores=[StoreItem(key, start, blocks)])
        self.worker.begin_step(step)
        self.worker.store(step)

    def load(self, key: bytes, blocks: list[int], start: int = 0, first: int = 0) -> None:
        item = LoadItem(key, start, first, blocks)
        self.worker.begin_step(StepMetadata(number=1, loads=[LoadJob("r", [item])]))

    def loads_before(self, item: LoadItem, adapter: AdapterUse = NO_ADAPTER) -> bool:
        """Whether a load ends before the forward of the step that ordered it."""
        step = StepMetadata(number=1, tokens=1, loads=[LoadJob("r", [item], adapter)])
        self.worker.before_forward(step)
        began = bool(self.worker._running)
        if began:
            assert self.finish_load() == set()
        self.worker.begin_step(step)
        if not began:
            self.finish_load()
        return began

    def report(self) -> WorkerReport:
        """The next report."""
        return wait_for(self.worker.take_report)

    def settled(self) -> WorkerReport:
        """Reports until one tells the outcome of a store."""
        report = self.report()
        while not (report.stored or report.dropped):
            report.aggregate(self.report())
        return report

    def finish_load(self) -> set[int]:
        """Wait for the load; returns its bad blocks."""
        assert wait_for(lambda: self.worker.poll(idle=True)) == {"r"}
        return self.worker.take_bad_blocks()

    def counters(self) -> dict[str, float]:
        stats = self.worker.take_stats()
        return {} if stats is None else stats.data


def wait_for(ask: Any) -> Any:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        answer = ask()
        if answer:
            return answer
        time.sleep(0.005)
    raise AssertionError("nothing happened in 20 s")


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.worker.shutdown()


def test_store_then_load_into_other_blocks(rig: Rig) -> None:
    rig.store(b"k", [1, 2, 3, 4], start=128)
    report = rig.report()
    assert [(key, rank) for key, rank, _ in report.stored] == [(b"k", 0)]
    assert report.stored[0][2] == rig.worker.arena.used
    rig.load(b"k", [21, 22], start=128, first=1)
    assert rig.finish_load() == set()
    for pages in rig.caches.values():
        assert torch.equal(pages[[21, 22]], pages[[2, 3]])
        assert not torch.equal(pages[20], pages[1])
    counters = rig.counters()
    assert counters["loaded_tokens"] == 2 * BLOCK
    assert counters["stored_raw_bytes"] == CHUNK_BYTES


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda blob: None, "missing"),
        (lambda blob: b"", "truncated"),
        (lambda blob: blob[:-1], "checksum"),
        (lambda blob: b"XXXX" + blob[4:], "magic"),
        (lambda blob: blob[:200] + bytes([blob[200] ^ 1]) + blob[201:], "checksum"),
    ],
)
def test_damage_is_reported_and_the_blocks_left_alone(rig: Rig, damage: Any, reason: str) -> None:
    rig.store(b"k", [1, 2, 3, 4])
    rig.report()
    blob = damage(rig.worker.arena.read(b"k"))
    rig.worker.arena.remove([b"k"])
    if blob is not None:
        rig.worker.arena.write(b"k", blob)
    before = {name: pages.clone() for name, pages in rig.caches.items()}
    rig.load(b"k", [20, 21, 22, 23])
    assert rig.finish_load() == {20, 21, 22, 23}
    assert rig.report().bad == [b"k"]
    assert rig.counters()[f"failed_loads/{reason}"] == 1
    assert all(torch.equal(before[name], rig.caches[name]) for name in before)


def slow_reads(rig: Rig) -> tuple[threading.Event, threading.Semaphore]:
    """Reads of memory wait for the event; the semaphore has one for every read that has begun."""
    slow, begun = threading.Event(), threading.Semaphore(0)
    read = rig.worker.arena.read

    def reading(key: bytes) -> bytes:
        begun.release()
        slow.wait(20)
        return read(key)

    rig.worker.arena.read = reading  # type: ignore[method-assign]
    return slow, begun


def test_a_load_that_is_late_is_given_up_and_the_slow_tier_shows(rig: Rig) -> None:
    """What it was to load is recomputed; the chunks are sound and stay."""
    rig.store(b"k", [1, 2, 3, 4])
    rig.report()
    slow, begun = slow_reads(rig)
    items = [LoadItem(b"k", 0, 0, [20 + 4 * n, 21 + 4 * n, 22 + 4 * n, 23 + 4 * n]) for n in (0, 1)]
    threads = rig.worker._loads._num_threads
    for number in range(threads):  # the queue before it
        before = LoadJob(f"before {number}", [LoadItem(b"k", 0, 0, [8, 9, 10, 11])])
        rig.worker.begin_step(StepMetadata(number=1, loads=[before]))
    job = LoadJob("r", items, patience=0.05)
    rig.worker.begin_step(StepMetadata(number=1, loads=[job]))
    assert all(begun.acquire(timeout=20) for _ in range(threads))
    time.sleep(0.1)
    hangs = rig.report().loading
    assert hangs.ended == 0
    assert hangs.running == 128
    assert hangs.running_seconds >= 0.1
    slow.set()
    finished: set[str] = set()
    report = WorkerReport(0)
    while len(finished) < 1 + threads:
        finished |= wait_for(lambda: rig.worker.poll(idle=True))
        report = report.aggregate(rig.worker.take_report() or WorkerReport(0))
    assert rig.worker.take_bad_blocks() == set(range(20, 28))
    assert report.bad == []
    assert report.loading.ended == 128 * threads
    assert report.loading.seconds >= 0.1 * threads
    counters = rig.counters()
    assert counters["failed_loads/late"] >= 1
    assert counters["loaded_chunks"] == threads


def test_a_load_that_the_scheduler_gives_up_ends_at_once(rig: Rig) -> None:
    """What no thread has begun is reported in the same step, what one is at when it comes back."""
    rig.store(b"k", [1, 2, 3, 4])
    rig.report()
    slow, begun = slow_reads(rig)
    threads = rig.worker._loads._num_threads
    jobs = [
        LoadJob(f"{n}", [LoadItem(b"k", 0, 0, [4 * n + 8 + i for i in range(4)])]) for n in range(9)
    ]
    rig.worker.begin_step(StepMetadata(number=1, loads=jobs))
    assert all(begun.acquire(timeout=20) for _ in range(threads))
    rig.worker.begin_step(StepMetadata(number=2, give_up=["7", "0", "8", "unknown"]))
    assert rig.worker.poll(idle=False) == {"7", "8"}
    assert rig.worker.take_bad_blocks() == set(range(36, 44))
    slow.set()
    finished: set[str] = set()
    while len(finished) < 7:
        finished |= wait_for(lambda: rig.worker.poll(idle=True))
    # A record that is being read when its load is given up is still loaded.
    assert rig.worker.take_bad_blocks() == set()
    assert threads < 7
    counters = rig.counters()
    assert counters["failed_loads/late"] == 2
    assert counters["loaded_chunks"] == 7
    assert rig.report().bad == []
    rig.worker.begin_step(StepMetadata(number=3, give_up=["1"]))  # it has ended
    assert rig.worker.poll(idle=False) == set()


def test_no_thread_has_an_empty_round_where_others_have_a_batch(rig: Rig) -> None:
    loads = rig.worker._loads
    loads._num_threads = 2
    loads._transfers = [Batches(4)]
    assert [loads._batch_sizes(n)[0] for n in (1, 4, 5, 8, 9, 11, 12, 64)] == [
        1,
        4,
        3,
        4,
        3,
        3,
        3,
        4,
    ]
    loads._transfers = [Batches(sys.maxsize)]
    assert loads._batch_sizes(99) == [99]


class Batches:
    """Of a transfer only the most records that it loads together."""

    def __init__(self, most: int) -> None:
        self.load_batch = most


def test_a_chunk_of_another_position_is_refused(rig: Rig) -> None:
    rig.store(b"k", [1, 2, 3, 4], start=0)
    rig.report()
    rig.load(b"k", [20, 21, 22, 23], start=128)
    assert rig.finish_load() == {20, 21, 22, 23}
    assert rig.counters()["failed_loads/geometry"] == 1


def test_a_chunk_of_another_prompt_is_refused(rig: Rig) -> None:
    """A valid blob at the right position, under the wrong name."""
    rig.store(b"a", [1, 2, 3, 4])
    rig.report()
    blob = rig.worker.arena.read(b"a")
    assert blob is not None
    rig.worker.arena.write(b"b", blob)
    rig.load(b"b", [20, 21, 22, 23])
    assert rig.finish_load() == {20, 21, 22, 23}
    assert rig.counters()["failed_loads/fingerprint"] == 1


def test_only_the_bad_chunk_of_a_job_is_recomputed(rig: Rig) -> None:
    rig.store(b"a", [1, 2, 3, 4], start=0)
    rig.report()
    items = [LoadItem(b"a", 0, 0, [20, 21, 22, 23]), LoadItem(b"b", 128, 0, [24, 25, 26, 27])]
    rig.worker.begin_step(StepMetadata(loads=[LoadJob("r", items)]))
    assert rig.finish_load() == {24, 25, 26, 27}
    assert rig.counters()["loaded_tokens"] == 128


class SlowCodec(RawCodec):
    """Encodes only when told to."""

    def __init__(self) -> None:
        super().__init__(codec_geometry(GROUP), torch.bfloat16)
        self.go = threading.Event()

    def encode(self, k: torch.Tensor, v: torch.Tensor, start: int, key: bytes = b"") -> bytes:
        assert self.go.wait(20)
        return super().encode(k, v, start, key)


def test_a_full_staging_pool_drops_stores_at_once() -> None:
    codec = SlowCodec()
    rig = Rig(codec, staging_bytes=2 * CHUNK_BYTES)
    for i in range(3):
        rig.store(bytes([i]), [1, 2, 3, 4])
    report = rig.report()
    assert report.dropped == [(b"\x02", 0)]
    assert rig.counters()["dropped_stores/staging_full"] == 1
    codec.go.set()
    stored: list[bytes] = []
    while len(stored) < 2:
        stored += [key for key, _, _ in rig.report().stored]
    assert sorted(stored) == [b"\x00", b"\x01"]
    rig.store(b"later", [1, 2, 3, 4])
    assert rig.report().stored[0][0] == b"later"
    rig.worker.shutdown()


def test_work_of_an_older_epoch_is_dropped() -> None:
    """A reset while the encoder runs: the blob must not appear afterwards."""
    codec = SlowCodec()
    rig = Rig(codec)
    rig.store(b"old", [1, 2, 3, 4])
    rig.worker.begin_step(StepMetadata(epoch=1))
    codec.go.set()
    rig.store(b"new", [1, 2, 3, 4], epoch=1)
    report = rig.settled()
    assert report.epoch == 1
    assert [key for key, _, _ in report.stored] == [b"new"]
    assert rig.worker.arena.keys() == [b"new"]
    rig.worker.shutdown()


def test_an_arena_at_its_cap_refuses() -> None:
    rig = Rig(memory_bytes=CHUNK_BYTES + 4096)
    rig.store(b"a", [1, 2, 3, 4])
    rig.report()
    rig.store(b"b", [1, 2, 3, 4])
    assert rig.report().dropped == [(b"b", 0)]
    assert rig.counters()["dropped_stores/tier_full"] == 1
    rig.worker.shutdown()


@pytest.mark.parametrize(
    ("error", "reason"),
    [(CodecError("non_finite", "NaN"), "non_finite"), (RuntimeError("boom"), "error")],
)
def test_encoder_errors_drop_the_store(error: Exception, reason: str) -> None:
    class Failing(SlowCodec):
        def encode(self, k: torch.Tensor, v: torch.Tensor, start: int, key: bytes = b"") -> bytes:
            raise error

    rig = Rig(Failing())
    rig.store(b"a", [1, 2, 3, 4])
    assert rig.report().dropped == [(b"a", 0)]
    assert rig.counters()[f"dropped_stores/{reason}"] == 1
    rig.worker.shutdown()


class Unexpected(MemoryArena):
    """Raises what no store may raise, as a system call does that nobody foresaw."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1 << 20)
        self.error = error
        self.fails = ""

    def read(self, key: bytes) -> bytes:
        if self.fails == "read":
            raise self.error
        return super().read(key)

    def write(self, key: bytes, blob: bytes, tenant: bytes = b"") -> int:
        if self.fails == "write" and key != b"first":
            raise self.error
        return super().write(key, blob, tenant)


UNEXPECTED = [
    (OSError("input/output error"), "error"),
    (MemoryError(), "out_of_memory"),
]


@pytest.mark.parametrize(("error", "reason"), UNEXPECTED)
def test_a_read_that_fails_as_nobody_foresaw_ends_its_load(error: Exception, reason: str) -> None:
    """Else the request would wait for ever."""
    memory = Unexpected(error)
    rig = Rig(memory=memory)
    rig.store(b"k", [1, 2, 3, 4])
    rig.settled()
    memory.fails = "read"
    rig.load(b"k", [21, 22, 23, 24])
    assert rig.finish_load() == {21, 22, 23, 24}
    assert rig.counters()[f"failed_loads/{reason}"] == 1
    report = rig.worker.take_report()
    # A lack of memory says nothing against the chunk.
    assert (report.bad if report else []) == ([] if reason == "out_of_memory" else [b"k"])
    rig.worker.shutdown()


@pytest.mark.parametrize(("error", "reason"), UNEXPECTED)
def test_a_write_that_fails_as_nobody_foresaw_is_reported(error: Exception, reason: str) -> None:
    """Else its room would be reserved for ever, and an idle engine would wait for it."""
    memory = Unexpected(error)
    rig = Rig(memory=memory)
    memory.fails = "write"
    stores = [StoreItem(b"first", 0, [1, 2, 3, 4]), StoreItem(b"second", 128, [5, 6, 7, 8])]
    step = StepMetadata(number=1, stores=stores)
    rig.worker.begin_step(step)
    rig.worker.store(step)
    report = rig.settled()
    while not (report.stored and report.dropped):
        report.aggregate(rig.report())
    assert [key for key, _, _ in report.stored] == [b"first"]
    assert report.dropped == [(b"second", 0)]
    assert rig.counters()[f"dropped_stores/{reason}"] == 1
    rig.worker.shutdown()


def test_reports_of_two_ranks_are_joined() -> None:
    first = WorkerReport(1, [(b"a", 0, 5)], [(b"b", 0)], [b"c"])
    second = WorkerReport(1, [(b"a", 1, 6)])
    joined = first.aggregate(second)
    assert isinstance(joined, WorkerReport)
    assert joined.stored == [(b"a", 0, 5), (b"a", 1, 6)]
    assert WorkerReport(0).aggregate(WorkerReport(1)).epoch == 1  # type: ignore[attr-defined]


# ------------------------------------------------ weights and adapters that change


class Changing:
    """Weights that are what a test says."""

    def __init__(self) -> None:
        self.model = nn.Linear(8, 8)
        self.watch = WeightsWatch([self.model])

    def change(self) -> None:
        with torch.no_grad():
            self.model.weight.neg_()


@pytest.fixture
def changing() -> Iterator[tuple[Rig, Changing]]:
    weights = Changing()
    made = Rig(names={"weights": weights.watch})
    yield made, weights
    made.worker.shutdown()


def test_what_other_weights_computed_gets_no_name(changing: tuple[Rig, Changing]) -> None:
    rig, weights = changing
    weights.change()
    step = StepMetadata(number=7, stores=[StoreItem(b"k", 0, [0, 1, 2, 3])])
    rig.worker.begin_step(step)
    rig.worker.store(step)
    report = rig.settled()
    assert report.stale_since == 7
    assert report.stored == []
    assert rig.counters()["dropped_stores/changed"] == 1
    assert len(rig.worker.arena) == 0


def test_weights_exchanged_between_forward_and_encoding_do_not_matter(
    changing: tuple[Rig, Changing],
) -> None:
    rig, weights = changing
    step = StepMetadata(number=7, stores=[StoreItem(b"k", 0, [0, 1, 2, 3])])
    rig.worker.begin_step(step)
    rig.worker.store(step)
    weights.change()
    assert rig.report().stored


def test_chunks_of_other_weights_are_not_loaded_and_not_called_bad(
    changing: tuple[Rig, Changing],
) -> None:
    rig, weights = changing
    rig.store(b"k", [0, 1, 2, 3])
    rig.report()
    weights.change()
    before = [cache.clone() for cache in rig.caches.values()]
    rig.load(b"k", [8, 9, 10, 11])
    assert rig.finish_load() == {8, 9, 10, 11}
    assert all(map(torch.equal, before, rig.caches.values()))
    report = rig.report()
    assert (report.bad, report.disk_lost) == ([], [])
    assert rig.counters()["failed_loads/changed"] == 1


def test_weights_that_change_while_a_load_runs_cost_the_load(
    changing: tuple[Rig, Changing],
) -> None:
    rig, weights = changing
    rig.store(b"k", [0, 1, 2, 3])
    rig.report()
    rig.load(b"k", [8, 9, 10, 11])
    while "loaded_chunks" not in rig.counters():
        time.sleep(0.005)
    weights.change()
    assert rig.finish_load() == {8, 9, 10, 11}


class HeldCodec(RawCodec):
    """Decodes nothing until it may."""

    def __init__(self) -> None:
        super().__init__(codec_geometry(GROUP), torch.bfloat16)
        self.go = threading.Event()

    def decode(self, *args: Any, **options: Any) -> Any:
        assert self.go.wait(20)
        return super().decode(*args, **options)


def test_a_load_of_before_a_change_is_recomputed_although_the_names_are_right_again() -> None:
    codec, weights = HeldCodec(), Changing()
    rig = Rig(codec, names={"weights": weights.watch})
    rig.store(b"k", [0, 1, 2, 3])
    rig.settled()
    rig.load(b"k", [8, 9, 10, 11])
    weights.change()
    rig.worker.begin_step(StepMetadata(number=2, tokens=1, epoch=1))
    assert rig.report().other_weights
    codec.go.set()
    assert rig.finish_load() == {8, 9, 10, 11}
    assert not rig.worker._outbox.take_report(3).stale_since  # the new names stand
    rig.worker.shutdown()


def test_a_load_that_fails_late_does_not_taint_the_names_of_after_it() -> None:
    weights = Changing()
    rig = Rig(names={"weights": weights.watch})
    weights.change()
    step = StepMetadata(number=1, tokens=1, check=True)
    rig.worker.begin_step(step)
    proof = rig.worker._prove(step)
    rig.worker.begin_step(StepMetadata(number=2, tokens=1, epoch=1))
    rig.worker._loads.check(proof)
    rig.worker._loads.shutdown()
    assert not rig.worker._outbox.take_report(2).stale_since
    rig.worker.shutdown()


def test_an_adapter_that_is_replaced_while_a_load_runs_costs_the_load() -> None:
    manager, codec = Manager(), HeldCodec()
    use = AdapterUse(1, (loaded(manager),))
    rig = Rig(codec, names={"adapters": LoadedAdapters(manager)})
    step = StepMetadata(number=1, tokens=1, stores=[StoreItem(b"k", 0, [0, 1, 2, 3], use)])
    rig.worker.begin_step(step)
    rig.worker.store(step)
    rig.settled()
    item = LoadItem(b"k", 0, 0, [8, 9, 10, 11])
    rig.worker.begin_step(StepMetadata(number=2, loads=[LoadJob("r", [item], use)]))
    manager.files[1] = 5.0
    manager.add_adapter(FakeLora(load_inplace=True))
    codec.go.set()
    assert rig.finish_load() == {8, 9, 10, 11}
    assert rig.report().adapters[1][0] not in (use.parts[0], None)
    rig.worker.shutdown()


def test_a_check_tells_of_weights_although_nothing_is_stored(
    changing: tuple[Rig, Changing],
) -> None:
    rig, weights = changing
    rig.worker.begin_step(StepMetadata(number=3, tokens=8, check=True))
    assert not wait_for(rig.worker.take_report).stale_since
    weights.change()
    rig.worker.begin_step(StepMetadata(number=4, tokens=8, check=True))
    rig.worker.poll(idle=True)
    report = wait_for(rig.worker.take_report)
    while not report.stale_since:
        report.aggregate(wait_for(rig.worker.take_report))
    assert report.stale_since == 4


def test_names_are_made_by_the_first_step_that_computes(changing: tuple[Rig, Changing]) -> None:
    """Until then the model may be asleep, and its memory not be there."""
    rig, weights = changing
    before = rig.codec.identity
    rig.worker.begin_step(StepMetadata(number=1, epoch=1, generation=b"nonce"))
    assert rig.codec.identity == before
    rig.worker.begin_step(StepMetadata(number=2, tokens=1, epoch=1, generation=b"nonce"))
    second = rig.codec.identity
    report = rig.report()
    assert (report.named_in, report.other_weights) == (2, False)
    weights.change()
    rig.worker.begin_step(StepMetadata(number=3, tokens=1, epoch=2, generation=b"nonce"))
    report = rig.report()
    assert (report.named_in, report.other_weights) == (3, True)
    assert len({before, second, rig.codec.identity}) == 3
    weights.change()
    rig.worker.begin_step(StepMetadata(number=4, tokens=1, epoch=3))
    assert rig.codec.identity == before


def test_a_blob_of_an_older_generation_is_not_read(changing: tuple[Rig, Changing]) -> None:
    rig, _ = changing
    rig.store(b"k", [0, 1, 2, 3])
    rig.report()
    blob = rig.worker.arena.read(b"k")
    rig.worker.begin_step(StepMetadata(number=2, tokens=1, epoch=1, generation=b"nonce"))
    assert rig.worker.arena.write(b"k", blob)
    item = LoadItem(b"k", 0, 0, [8, 9, 10, 11])
    rig.worker.begin_step(
        StepMetadata(number=3, epoch=1, generation=b"nonce", loads=[LoadJob("r", [item])])
    )
    assert rig.finish_load() == {8, 9, 10, 11}
    assert rig.counters()["failed_loads/fingerprint"] == 1


def test_another_adapter_than_the_name_says_costs_the_store_and_the_load() -> None:
    manager = Manager()
    right = loaded(manager)
    rig = Rig(names={"adapters": LoadedAdapters(manager)})
    for number, digest in enumerate((right, b"other")):
        use = AdapterUse(1, (digest,))
        step = StepMetadata(tokens=1, stores=[StoreItem(b"k", 0, [0, 1, 2, 3], use)])
        rig.worker.begin_step(step)
        rig.worker.store(step)
        assert len(rig.settled().stored) == 1 - number
        item = LoadItem(b"k", 0, 0, [8, 9, 10, 11])
        rig.worker.begin_step(StepMetadata(loads=[LoadJob("r", [item], use)]))
        assert rig.finish_load() == ({8, 9, 10, 11} if number else set())
    counters = rig.counters()
    assert counters["dropped_stores/changed"] == counters["failed_loads/changed"] == 1
    rig.worker.shutdown()


def test_a_slot_that_changed_without_a_sign_costs_the_store_and_all_names() -> None:
    manager = Manager()
    use = AdapterUse(1, (loaded(manager),))
    rig = Rig(names={"adapters": LoadedAdapters(manager)})
    rig.worker.begin_step(StepMetadata(number=1, tokens=1))
    for layer in manager.modules.values():
        layer.fill(0, 5.0)
    step = StepMetadata(number=2, tokens=1, stores=[StoreItem(b"k", 0, [0, 1, 2, 3], use)])
    rig.worker.begin_step(step)
    rig.worker.store(step)
    report = rig.settled()
    assert (report.dropped, report.stale_since) == ([(b"k", 0)], 2)
    rig.worker.begin_step(StepMetadata(number=3, tokens=1, epoch=1))
    assert rig.report().adapters[1][0] not in (use.parts[0], None)
    rig.worker.shutdown()


def test_a_load_does_not_wait_for_the_forward_of_its_step() -> None:
    """vLLM from 0.29 on starts loads after the forward, which on a CPU is then over."""
    rig = Rig()
    rig.store(b"k", [0, 1, 2, 3])
    rig.settled()
    assert rig.loads_before(LoadItem(b"k", 0, 0, [8, 9, 10, 11]))
    for cache in rig.caches.values():
        assert torch.equal(cache[8:12], cache[0:4])
    # It was started once.
    assert rig.counters()["loaded_chunks"] == 1
    # Adapters may be loaded by the step itself.
    assert not rig.loads_before(LoadItem(b"k", 0, 0, [8, 9, 10, 11]), AdapterUse(1, (b"x",)))
