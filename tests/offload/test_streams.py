"""The pipelines on a device's streams: what has failed runs no more, and nobody waits in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.streams import Event
from kvtc_vllm.config import load_config
from kvtc_vllm.offload.loading import LoadPipeline
from kvtc_vllm.offload.messages import LoadItem, LoadJob, StoreItem
from kvtc_vllm.offload.names import Proof
from kvtc_vllm.offload.outbox import Outbox
from kvtc_vllm.offload.rank_context import RankContext
from kvtc_vllm.offload.storing import StorePipeline
from kvtc_vllm.offload.unsettled import Unsettled
from kvtc_vllm.tiers.memory import MemoryArena
from tests.codec.kernels.fake_cuda import CUDA, FakeCuda
from tests.connector.fakes import geometry

SOUND = Proof(1, 0, ())
KEY = b"k"


class Work:
    """A transfer that launches something and then does as it is told."""

    store_batch = load_batch = 8
    tensors: Sequence[torch.Tensor] = ()

    def __init__(self, cuda: FakeCuda, then: Callable[[], None]) -> None:
        self._cuda, self._then = cuda, then
        self.points: list[Event | None] = []
        self.threads: list[int] = []

    def staged_bytes(self, blocks: int) -> int:
        return 1

    def stage(self, items: Sequence[StoreItem]) -> Work:
        return self

    def encode(self, staged: Any) -> list[Any]:
        self._cuda.launch("work")
        self.threads.append(threading.get_ident())
        self._then()
        return [b"blob"]

    def load(
        self, items: Sequence[tuple[LoadItem, Any]], point: Event | None = None
    ) -> list[ContainerError | None]:
        self.points.append(point)
        self.threads.append(threading.get_ident())
        self._cuda.launch("work")
        self._then()
        return [None] * len(items)


def context(work: Work) -> RankContext:
    config = load_config({"codec": "raw", "load_threads": 2, "encode_threads": 3})
    arena = MemoryArena(1 << 20)
    arena.write(KEY, b"blob")  # type: ignore[arg-type]
    unsettled = Unsettled(False, 0)
    return RankContext(config, geometry(), [work], CUDA, 100, 0, arena, None, Outbox(), unsettled)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def fail() -> None:
    raise torch.OutOfMemoryError("full")


def job(name: str) -> LoadJob:
    return LoadJob(name, [LoadItem(KEY, 0, 0, [5])])  # type: ignore[arg-type]


def test_a_failed_load_has_stopped_writing_when_its_blocks_are_told(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = context(Work(cuda, fail))
    told_at: list[int] = []
    notify = made.outbox.notify
    monkeypatch.setattr(made.outbox, "notify", lambda: (told_at.append(len(cuda.log)), notify()))
    pipeline = LoadPipeline(made)
    pipeline.begin(job("r"), SOUND, True)
    pipeline.shutdown()
    mine = [what for stream, what in cuda.log[: told_at[0]] if stream != "default"]
    assert mine[:2] == ["work", "synchronize"]
    assert made.outbox.take_bad_blocks() == {5}
    report = made.outbox.take_report(1)
    assert not report.bad, "memory was full, the chunk is sound"
    stats = made.outbox.take_stats()
    assert stats is not None
    assert stats.data["failed_loads/out_of_memory"] == 1


def test_a_load_does_not_wait_for_the_step_before_it_writes(cuda: FakeCuda) -> None:
    work = Work(cuda, lambda: None)
    pipeline = LoadPipeline(context(work))
    pipeline.begin(job("r"), SOUND, True)
    pipeline.shutdown()
    assert isinstance(work.points[0], Event), "the transfer is told what to wait for"
    assert not any("wait" in what for _, what in cuda.log)


def test_loads_on_two_threads_run_on_two_streams(cuda: FakeCuda) -> None:
    both = threading.Barrier(2, timeout=30)
    pipeline = LoadPipeline(context(Work(cuda, both.wait)))
    for name in ("r", "s"):
        pipeline.begin(job(name), SOUND, True)
    pipeline.shutdown()
    assert len({stream for stream, what in cuda.log if what == "work"}) == 2


def test_a_failed_store_has_run_when_its_staging_is_given_back(cuda: FakeCuda) -> None:
    made = context(Work(cuda, fail))
    pipeline = StorePipeline(made)
    seen: list[list[str]] = []
    pipeline._release = lambda items: seen.append(  # type: ignore[method-assign]
        [what for stream, what in cuda.log if stream != "default"]
    )
    pipeline.store([StoreItem(b"n", 0, [1])], 0, SOUND)  # type: ignore[arg-type]
    pipeline.shutdown()
    assert "work" in seen[0]
    assert seen[0][-1] == "synchronize"
    stats = made.outbox.take_stats()
    assert stats is not None
    assert stats.data["dropped_stores/out_of_memory"] == 1


def test_every_thread_is_warmed_up_on_the_stream_that_it_will_use(cuda: FakeCuda) -> None:
    made = context(work := Work(cuda, lambda: None))
    stores, loads = StorePipeline(made), LoadPipeline(made)
    items = [StoreItem(b"n", 0, [1])]  # type: ignore[arg-type]
    assert stores.warm_up(items) == [b"blob"]
    assert len(set(work.threads)) == 3
    encoding = {stream for stream, what in cuda.log if what == "work"}
    loads.warm_up([(LoadItem(KEY, 0, 0, [5]), b"blob")])  # type: ignore[arg-type]
    warm = set(work.threads[3:])
    assert len(warm) == 2
    cuda.log.clear()
    loads.begin(job("r"), SOUND, True)
    stores.store(items, 0, SOUND)
    while len(work.threads) < 7:  # what waits for a thread at shutdown is dropped
        time.sleep(0.001)
    loads.shutdown()
    stores.shutdown()
    served = [stream for stream, what in cuda.log if what == "work"]
    assert len(encoding) == 1
    assert sum(stream in encoding for stream in served) == 1
    assert work.threads[-1] in work.threads[:5]
    assert work.threads[-2] in work.threads[:5]
    assert not made.outbox.take_bad_blocks()
    assert len(made.memory.read(KEY)) == 4
