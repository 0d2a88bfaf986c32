"""Several cache groups: a chunk is as many records, and a hit needs all of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.config import load_config
from kvtc_vllm.connector.torch_transfer import TorchTransfer
from kvtc_vllm.offload.geometry import CacheGeometry, codec_geometry
from kvtc_vllm.offload.messages import StepMetadata, WorkerReport
from kvtc_vllm.offload.names import Names
from kvtc_vllm.offload.scheduler import KVTCScheduler
from kvtc_vllm.offload.worker import KVTCWorker
from kvtc_vllm.tiers.keys import record_key
from kvtc_vllm.vllm_cache.layout import PagedLayout
from tests.connector.fakes import BLOCK, FakeNew, FakeOutput, FakeRequest, geometry

CHUNK = 4 * BLOCK
FIRST = geometry(head_size=64).only_group
SECOND = replace(
    FIRST,
    layer_names=("layers.2",),
    block_size=2 * BLOCK,
    head_size=32,
    head_size_v=32,
    layer_table=(1,),
)
CACHE = CacheGeometry((FIRST, SECOND), 1)
BOUNDS = [1 << 17, 1 << 15]
TABLES = ([0, 1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6])


def scheduler() -> KVTCScheduler:
    config = load_config({"codec": "raw", "memory_bytes": "4MiB", "recent_window": 0})
    return KVTCScheduler(config, CACHE, BOUNDS, prompt_only=False)


def begin(side: KVTCScheduler, request: FakeRequest) -> StepMetadata:
    side.match(request, 0)
    side.plan_load(request, TABLES, 0)
    new = FakeNew(request.request_id, TABLES, 0)  # type: ignore[arg-type]
    scheduled = {request.request_id: request.num_tokens}
    return side.plan_step(FakeOutput([new], num_scheduled_tokens=scheduled))


def test_a_chunk_is_one_record_per_group() -> None:
    step = begin(scheduler(), FakeRequest("r", 2 * CHUNK))
    assert [(item.key, item.group, item.start, item.block_ids) for item in step.stores] == [
        (b"a:3", 0, 0, [0, 1, 2, 3]),
        (b"a:3\x01", 1, 0, [9, 8]),
        (b"a:7", 0, CHUNK, [4, 5, 6, 7]),
        (b"a:7\x01", 1, CHUNK, [7, 6]),
    ]


def test_a_hit_needs_the_records_of_all_groups() -> None:
    side = scheduler()
    step = begin(side, FakeRequest("r", 2 * CHUNK))
    asking = FakeRequest("s", 2 * CHUNK)
    for item in step.stores[:-1]:
        side.apply_report(WorkerReport(0, [(item.key, 0, 1000)]), None)
    assert side.match(asking, 0) == CHUNK
    side.apply_report(WorkerReport(0, [(step.stores[-1].key, 0, 1000)]), None)
    # A token is left for its logits, and vLLM goes on at whole blocks of all groups.
    assert side.match(asking, 0) == 2 * CHUNK - 2 * BLOCK
    side.plan_load(asking, ([10, 11, 12, 13, 14, 15, 16], [20, 21, 22, 23]), 2 * CHUNK - 2 * BLOCK)
    (job,) = side.plan_step(FakeOutput()).loads
    assert [(item.group, item.first_block, item.block_ids) for item in job.items] == [
        (0, 0, [10, 11, 12, 13]),
        (1, 0, [20, 21]),
        (0, 0, [14, 15]),
        (1, 0, [22]),
    ]


def test_groups_go_to_their_own_pages_and_back() -> None:
    torch.manual_seed(0)
    caches = {name: torch.randn(40, 2, BLOCK, 128).bfloat16() for name in FIRST.layer_names}
    caches["layers.2"] = torch.randn(40, 2, 2 * BLOCK, 64).bfloat16()
    transfers, layouts = [], []
    for group in CACHE.groups:
        layout = PagedLayout({name: caches[name] for name in group.layer_names}, group)
        codec = RawCodec(codec_geometry(group), torch.bfloat16)
        layouts.append(layout)
        transfers.append(TorchTransfer(layout, codec, CHUNK))
    config = load_config({"codec": "raw", "memory_bytes": "4MiB", "recent_window": 0})
    names = Names([transfer.codec for transfer in transfers])  # type: ignore[misc]
    worker = KVTCWorker(config, CACHE, transfers, layouts[0].device, 1 << 24, 0, names)
    side = scheduler()
    step = begin(side, FakeRequest("r", 2 * CHUNK))
    worker.begin_step(step)
    worker.store(step)
    stored: set[bytes] = set()
    while len(stored) < 4:
        report = worker.take_report()
        if report is not None:
            stored |= {key for key, _, _ in report.stored}
            assert not report.dropped
            side.apply_report(report, None)
    raw = CHUNK * CACHE.token_bytes * 2
    assert raw < side.index.ready_bytes < raw + 4 * 4096

    asking = FakeRequest("s", 2 * CHUNK + 1)
    assert side.match(asking, 0) == 2 * CHUNK
    targets = ([20, 21, 22, 23, 24, 25, 26, 27], [30, 31, 32, 33])
    side.plan_load(asking, targets, 2 * CHUNK)
    load = side.plan_step(FakeOutput())
    worker.begin_step(load)
    while not (finished := worker.poll(idle=True)):
        pass
    assert finished == {"s"}
    assert not worker.take_bad_blocks()
    for layout, source, target in zip(layouts, TABLES, targets, strict=True):
        for theirs, ours in zip(layout.gather(source), layout.gather(target), strict=True):
            assert torch.equal(theirs, ours)
    stats = worker.take_stats()
    assert stats is not None
    assert stats.data["loaded_tokens"] == 2 * CHUNK
    worker.shutdown()


def test_a_record_of_the_first_group_has_the_chunk_s_key() -> None:
    assert record_key(b"hash", 0) == b"hash"  # type: ignore[arg-type]
    assert record_key(b"hash", 1) != record_key(b"hash", 2)  # type: ignore[arg-type]
