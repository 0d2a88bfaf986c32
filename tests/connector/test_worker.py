"""The worker side alone: staging, failures, resets, on a paged cache without a model."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from fakes import BLOCK, geometry

from kvtc_vllm.codec.codec import ChunkCodec
from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.config import load_config
from kvtc_vllm.connector.layout import PagedLayout
from kvtc_vllm.connector.messages import (
    LoadItem,
    LoadJob,
    StepMetadata,
    StoreItem,
    WorkerReport,
)
from kvtc_vllm.connector.sizing import divide
from kvtc_vllm.connector.startup import codec_geometry
from kvtc_vllm.connector.transfer import TorchTransfer
from kvtc_vllm.connector.worker import KVTCWorker

SHAPE = geometry(head_size=64)
CHUNK_BYTES = 4 * BLOCK * SHAPE.token_bytes


class Rig:
    """A worker over random pages."""

    def __init__(self, codec: ChunkCodec | None = None, **extra: Any) -> None:
        self.caches = {
            name: torch.randn(40, 2, BLOCK, 128).to(torch.bfloat16) for name in SHAPE.layer_names
        }
        self.codec = codec or RawCodec(codec_geometry(SHAPE, ((0, 2),)), torch.bfloat16)
        config = load_config({"codec": "raw", "memory_bytes": "1MiB", **extra})
        layout = PagedLayout(self.caches, SHAPE)
        transfer = TorchTransfer(layout, self.codec, config.chunk_tokens)
        plan = divide(config.staging_capacity, 0, None)
        self.worker = KVTCWorker(config, SHAPE, transfer, layout.device, plan.staging, rank=0)

    def store(self, key: bytes, blocks: list[int], start: int = 0, epoch: int = 0) -> None:
        step = StepMetadata(epoch=epoch, stores=[StoreItem(key, start, blocks)])
        self.worker.begin_step(step)
        self.worker.store(step)

    def load(self, key: bytes, blocks: list[int], start: int = 0, first: int = 0) -> None:
        item = LoadItem(key, start, first, blocks)
        self.worker.begin_step(StepMetadata(loads=[LoadJob("r", [item])]))

    def report(self) -> WorkerReport:
        """The next report."""
        return wait_for(self.worker.take_report)

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
    blob = damage(rig.worker.arena.get(b"k"))
    rig.worker.arena.remove([b"k"])
    if blob is not None:
        rig.worker.arena.put(b"k", blob)
    before = {name: pages.clone() for name, pages in rig.caches.items()}
    rig.load(b"k", [20, 21, 22, 23])
    assert rig.finish_load() == {20, 21, 22, 23}
    assert rig.report().bad == [b"k"]
    assert rig.counters()[f"failed_loads/{reason}"] == 1
    assert all(torch.equal(before[name], rig.caches[name]) for name in before)


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
    blob = rig.worker.arena.get(b"a")
    assert blob is not None
    rig.worker.arena.put(b"b", blob)
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
        super().__init__(codec_geometry(SHAPE, ((0, 2),)), torch.bfloat16)
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
    report = rig.report()
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
    [(CodecError("non-finite: NaN"), "non_finite"), (RuntimeError("boom"), "error")],
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


def test_reports_of_two_ranks_are_joined() -> None:
    first = WorkerReport(1, [(b"a", 0, 5)], [(b"b", 0)], [b"c"])
    second = WorkerReport(1, [(b"a", 1, 6)])
    joined = first.aggregate(second)
    assert isinstance(joined, WorkerReport)
    assert joined.stored == [(b"a", 0, 5), (b"a", 1, 6)]
    assert WorkerReport(0).aggregate(WorkerReport(1)).epoch == 1  # type: ignore[attr-defined]
