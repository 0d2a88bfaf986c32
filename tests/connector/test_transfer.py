"""Both ways between paged cache and blobs, on pages in the CPU backend's own order."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.config import load_config
from kvtc_vllm.connector.torch_transfer import TorchTransfer
from kvtc_vllm.offload.messages import LoadItem, LoadJob, StepMetadata, StoreItem
from kvtc_vllm.offload.names import Names
from kvtc_vllm.offload.worker import KVTCWorker
from kvtc_vllm.vllm_cache.layout import PagedLayout
from tests.codec.kernels.codecs import ALL, REFERENCE, artifact_of
from tests.codec.synthetic import SyntheticModel
from tests.connector.fakes import BLOCK, geometry

pytest.importorskip("triton", reason="kernels need Triton, which vLLM brings")

from kvtc_vllm.codec.kernels.paged_codec import PAGED_CODECS  # isort: skip
from kvtc_vllm.connector.kernel_transfer import KernelTransfer  # isort: skip

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="kernels are compiled where there is a GPU"
    ),
    pytest.mark.slow,
]

SHAPE = geometry(head_size=32)
FP8 = torch.float8_e4m3fn
MODEL = SyntheticModel(
    num_layers=2, num_kv_heads=2, head_size=32, head_size_v=32, layer_groups=((0, 1), (1, 2))
)
CHUNK = BLOCK
PROMISED = 0.17
"""A little above the relative squared error of the plan on this data."""
TARGETS = [[20], [22], [21]]
ITEMS = [
    StoreItem(b"a", 0, [3]),
    StoreItem(b"b", CHUNK, [1]),
    StoreItem(b"c", 4 * CHUNK, [7]),
]
LOADS = [
    LoadItem(item.key, item.start, 0, blocks) for item, blocks in zip(ITEMS, TARGETS, strict=True)
]


@pytest.fixture(scope="module", params=ALL)
def artifact(request: pytest.FixtureRequest) -> Any:
    return artifact_of(request.param, MODEL, (8.0,))


class Pages:
    """A paged cache with three chunks of the synthetic model in it."""

    def __init__(self, artifact: Any, dtype: torch.dtype = torch.bfloat16) -> None:
        caches = {
            name: torch.zeros(32, 2, BLOCK, 64, dtype=dtype)
            for name in SHAPE.only_group.layer_names
        }
        self.caches = caches
        self.layout = PagedLayout(caches, replace(SHAPE.only_group, dtype=dtype))
        for number, item in enumerate(ITEMS):
            self.layout.scatter(item.block_ids, *MODEL.chunk(CHUNK, item.start, number, dtype))
        codec = REFERENCE[artifact.codec](artifact, 8.0, dtype)
        paged = PAGED_CODECS[artifact.codec](artifact, 8.0, self.layout.sides(), BLOCK)
        self.ways: dict[str, TorchTransfer | KernelTransfer] = {
            "torch": TorchTransfer(self.layout, codec, CHUNK),
            "kernels": KernelTransfer(paged, CHUNK),
        }

    def worker(self, way: str, staging: int = 1 << 24) -> KVTCWorker:
        config = load_config({"memory_bytes": "1MiB", "chunk_tokens": CHUNK})
        transfer = self.ways[way]
        names = Names([transfer.codec])
        return KVTCWorker(config, SHAPE, [transfer], self.layout.device, staging, 0, names)

    def error(self) -> float:
        """Largest relative squared error of what lies in the targets."""
        errors = []
        for item, blocks in zip(ITEMS, TARGETS, strict=True):
            for wanted, found in zip(
                self.layout.gather(item.block_ids), self.layout.gather(blocks), strict=True
            ):
                difference = (wanted.float() - found.float()).square().sum()
                errors.append(float(difference / wanted.float().square().sum()))
        return max(errors)


@pytest.fixture
def pages(artifact: Any) -> Pages:
    return Pages(artifact)


def test_views_read_what_the_page_order_says(pages: Pages) -> None:
    cache = pages.layout.sides()
    k, v = pages.layout.gather([3])
    for side, x in ((cache.k, k), (cache.v, v)):
        for layer, view in enumerate(side.views):
            assert torch.equal(view[3].transpose(0, 1), x[:, layer])


@pytest.mark.parametrize("writer", ["torch", "kernels"])
@pytest.mark.parametrize("reader", ["torch", "kernels"])
def test_each_way_reads_what_the_other_wrote(pages: Pages, writer: str, reader: str) -> None:
    blobs = pages.ways[writer].encode(pages.ways[writer].stage(ITEMS))
    assert not any(isinstance(blob, CodecError) for blob in blobs), blobs
    assert pages.error() == 1
    assert pages.ways[reader].load(list(zip(LOADS, blobs, strict=True))) == [None] * 3
    assert pages.error() < PROMISED


@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's CPU build has fp8 caches with AVX-512"
)
@pytest.mark.parametrize(("writer", "reader"), [("torch", "kernels"), ("kernels", "torch")])
def test_each_way_reads_what_the_other_wrote_of_an_fp8_cache(
    artifact: Any, writer: str, reader: str
) -> None:
    pages = Pages(artifact, FP8)
    blobs = pages.ways[writer].encode(pages.ways[writer].stage(ITEMS))
    assert pages.ways[reader].load(list(zip(LOADS, blobs, strict=True))) == [None] * 3
    assert pages.error() < PROMISED


def run(worker: KVTCWorker, step: StepMetadata) -> None:
    """One step; then wait for what it started."""
    worker.begin_step(step)
    worker.store(step)
    wanted = {job.request_id for job in step.loads}
    left = len(step.stores)
    for _ in range(4000):
        wanted -= worker.poll(idle=True)
        report = worker.take_report()
        if report is not None:
            left -= len(report.stored) + len(report.dropped)
        if not wanted and left <= 0:
            return
    raise AssertionError(f"still waiting for {wanted} and {left} stores")


def test_a_batch_goes_through_the_worker(pages: Pages) -> None:
    worker = pages.worker("kernels")
    run(worker, StepMetadata(stores=ITEMS))
    assert len(worker.arena) == 3
    run(worker, StepMetadata(loads=[LoadJob("r", LOADS)]))
    assert worker.take_bad_blocks() == set()
    assert pages.error() < PROMISED
    stats = worker.take_stats()
    assert stats is not None
    assert stats.data["stored_chunks"] == stats.data["loaded_chunks"] == 3
    assert stats.data["loaded_tokens"] == 3 * CHUNK
    assert stats.data["stored_raw_bytes"] / stats.data["stored_bytes"] > 4
    worker.shutdown()


@pytest.mark.parametrize("way", ["torch", "kernels"])
def test_one_bad_chunk_of_a_batch(pages: Pages, way: str) -> None:
    """The chunks before it are good; what it costs is counted by its reason."""
    worker = pages.worker(way)
    run(worker, StepMetadata(stores=ITEMS))
    blob = worker.arena.read(b"c")
    assert blob is not None
    worker.arena.write(b"c", blob[:-1])
    run(worker, StepMetadata(loads=[LoadJob("r", LOADS)]))
    assert worker.take_bad_blocks() == set(TARGETS[2])
    worker.arena.remove([b"a"])
    run(worker, StepMetadata(loads=[LoadJob("r", LOADS)]))
    assert worker.take_bad_blocks() >= {*TARGETS[0], *TARGETS[2]}
    stats = worker.take_stats()
    assert stats is not None
    assert stats.data["failed_loads/missing"] == 1
    assert stats.data["failed_loads/checksum"] >= 1
    worker.shutdown()


@pytest.mark.parametrize("way", ["torch", "kernels"])
def test_what_finds_no_room_in_staging_is_the_tail(pages: Pages, way: str) -> None:
    worker = pages.worker(way, staging=2 * pages.ways[way].staged_bytes(1))
    run(worker, StepMetadata(stores=ITEMS))
    assert sorted(worker.arena.keys()) == [b"a", b"b"]
    run(worker, StepMetadata(stores=ITEMS[2:]))
    assert len(worker.arena) == 3
    worker.shutdown()


@pytest.mark.parametrize(
    ("error", "reason"),
    [(torch.OutOfMemoryError("full"), "out_of_memory"), (RuntimeError("boom"), "error")],
)
def test_a_failure_to_stage_is_a_dropped_store(
    pages: Pages, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    worker = pages.worker("kernels", staging=3 * pages.ways["kernels"].staged_bytes(1))

    def fail(items: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pages.ways["kernels"], "stage", fail)
        run(worker, StepMetadata(stores=ITEMS))
    assert len(worker.arena) == 0
    run(worker, StepMetadata(stores=ITEMS))  # the staging memory was given back
    assert len(worker.arena) == 3
    stats = worker.take_stats()
    assert stats is not None
    assert stats.data[f"dropped_stores/{reason}"] == 3
    worker.shutdown()


@pytest.mark.parametrize("way", ["torch", "kernels"])
def test_a_chunk_that_cannot_be_coded_costs_only_itself(pages: Pages, way: str) -> None:
    for cache in pages.caches.values():
        cache[1] = float("nan")
    worker = pages.worker(way)
    run(worker, StepMetadata(stores=ITEMS))
    assert sorted(worker.arena.keys()) == [b"a", b"c"]
    stats = worker.take_stats()
    assert stats is not None
    assert stats.data["dropped_stores/non_finite"] == 1
    worker.shutdown()


@pytest.mark.parametrize("way", ["torch", "kernels"])
def test_the_end_encodes_what_only_the_pages_hold(
    pages: Pages, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    for cache in pages.caches.values():
        cache[1] = float("nan")
    worker = pages.worker(way)
    run(worker, StepMetadata(kept=ITEMS))
    blobs = dict(worker._only_in_pages(time.monotonic() + 60))
    assert sorted(blobs) == [b"a", b"c"]
    assert f"chunk at token {CHUNK} not stored" in caplog.text
    loads = [(load, blobs[load.key]) for load in LOADS if load.key in blobs]
    assert pages.ways[way].load(loads) == [None] * 2
    worker.shutdown()
