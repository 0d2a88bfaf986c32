"""A worker's part of late stores: copied before the forward, proven twice, written at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.offload import worker as worker_module
from kvtc_vllm.offload.disk_worker import DiskWorker
from kvtc_vllm.offload.geometry import codec_geometry
from kvtc_vllm.offload.messages import StepMetadata, StoreItem
from kvtc_vllm.offload.namespace import Namespace
from kvtc_vllm.offload.weights import WeightsWatch
from kvtc_vllm.tiers.disk import DiskStore
from tests.connector.test_worker import GROUP, Rig
from tests.reliability.disk import chunk_files

BLOCKS = [0, 1, 2, 3]


def item(key: bytes, blocks: list[int]) -> StoreItem:
    return StoreItem(key, 0, blocks)  # type: ignore[arg-type]


def keep(rig: Rig, *items: StoreItem) -> None:
    """Run the step that completes these chunks and puts their stores off."""
    step = StepMetadata(number=1, tokens=1, kept=list(items))
    rig.worker.begin_step(step)
    rig.worker.store(step)


def rig_with_disk(root: Path, **names: Any) -> Rig:
    codec = RawCodec(codec_geometry(GROUP), torch.bfloat16)
    # Opened by the first write, when the codec has its identity.
    namespace = Namespace(lambda: DiskStore(root, codec.identity, capacity=1 << 22, min_free=0))
    return Rig(codec, names=names, disk=DiskWorker(namespace, 1, 5.0, 1 << 22))


def on_disk(root: Path, rig: Rig) -> set[bytes]:
    store = DiskStore(root, rig.codec.identity, capacity=1 << 22, min_free=0)
    try:
        return {bytes(entry.key) for entry in store.scan()}
    finally:
        store.close()


def test_what_a_step_overwrites_is_copied_before_its_forward() -> None:
    """vLLM from 0.29 on calls `start_load_kv` after the forward was launched."""
    rig = Rig()
    before = {name: cache[:4].clone() for name, cache in rig.caches.items()}
    step = StepMetadata(number=1, tokens=1, stage_first=[item(b"late", BLOCKS)])
    rig.worker.before_forward(step)
    for cache in rig.caches.values():
        cache[:4] = 0  # the forward
    rig.worker.begin_step(step)
    rig.worker.store(step)
    assert [key for key, _, _ in rig.settled().stored] == [b"late"]
    rig.load(b"late", [8, 9, 10, 11])
    assert rig.finish_load() == set()
    for name, was in before.items():
        assert torch.equal(rig.caches[name][8:12], was)
    rig.worker.shutdown()


def test_a_chunk_of_other_weights_is_not_stored_when_the_first_are_back() -> None:
    model = nn.Linear(64, 64)
    rig = Rig(names={"weights": WeightsWatch([model])})
    checks: list[Any] = []
    rig.worker._loads.check = lambda *arguments: checks.append(arguments)  # type: ignore[method-assign]
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
        keep(rig, item(b"late", BLOCKS))
        model.weight.copy_(first)
    assert len(checks) == 1
    rig.worker.begin_step(StepMetadata(number=2, tokens=1, stage_first=[item(b"late", BLOCKS)]))
    assert rig.settled().dropped == [(b"late", 0)]
    assert rig.counters()["dropped_stores/changed"] == 1
    rig.worker.shutdown()


def test_chunks_of_the_same_weights_are_stored() -> None:
    model = nn.Linear(64, 64)
    rig = Rig(names={"weights": WeightsWatch([model])})
    keep(rig, item(b"late", BLOCKS))
    rig.worker.begin_step(StepMetadata(number=2, tokens=1, stage_first=[item(b"late", BLOCKS)]))
    assert [key for key, _, _ in rig.settled().stored] == [b"late"]
    rig.worker.shutdown()


def test_the_end_writes_what_only_the_pages_hold(tmp_path: Path) -> None:
    rig = rig_with_disk(tmp_path)
    keep(rig, item(b"stays", BLOCKS), item(b"stored", [4, 5, 6, 7]), item(b"gone", [8, 9, 10, 11]))
    step = StepMetadata(
        number=2,
        tokens=1,
        stage_first=[item(b"stored", [4, 5, 6, 7])],
        gone=[b"gone"],  # type: ignore[list-item]
    )
    rig.worker.before_forward(step)
    rig.worker.begin_step(step)
    rig.settled()
    rig.worker.shutdown()
    assert on_disk(tmp_path, rig) == {b"stays", b"stored"}


@pytest.mark.parametrize("why", ["weights", "epoch", "sleep"])
def test_the_end_writes_nothing_in_doubt(tmp_path: Path, why: str) -> None:
    model = nn.Linear(64, 64)
    rig = rig_with_disk(tmp_path, weights=WeightsWatch([model]), may_sleep=why == "sleep")
    keep(rig, item(b"kept", BLOCKS))
    if why == "weights":
        with torch.no_grad():
            model.weight += 1
    if why == "epoch":
        rig.worker.begin_step(StepMetadata(number=2, epoch=1, generation=b"new"))
    rig.worker.shutdown()
    assert chunk_files(tmp_path) == []


def test_the_end_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "SHUTDOWN_SECONDS", 0.0)
    rig = rig_with_disk(tmp_path)
    keep(rig, *(item(bytes([n]), BLOCKS) for n in range(8)))
    rig.worker.shutdown()
    assert chunk_files(tmp_path) == []
