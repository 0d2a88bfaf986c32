"""`joint: delta` below a worker: what is loaded is what was stored, or is recomputed."""

from __future__ import annotations

import random
import time
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from kvtc_vllm.codec.cpu.delta import DeltaCoder
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.config import ConfigError, load_config
from kvtc_vllm.connector import memory_tier
from kvtc_vllm.connector.memory_tier import with_joint
from kvtc_vllm.offload.disk_worker import DiskWorker
from kvtc_vllm.offload.messages import StepMetadata, StoreItem
from kvtc_vllm.offload.namespace import Namespace
from kvtc_vllm.tiers.delta_store import LOST, DeltaStore
from kvtc_vllm.tiers.disk import DiskStore
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.memory import MemoryArena
from tests.codec.synthetic import SyntheticModel
from tests.codec.v2.made_up import step_artifact
from tests.connector import test_worker
from tests.connector.fakes import FakeRequest, scheduler, start
from tests.connector.test_worker import Rig
from tests.reliability.disk import chunk_files

MODEL = SyntheticModel(num_layers=2, num_kv_heads=2, head_size=64)
A, B = RecordKey(b"a" * 32), RecordKey(b"b" * 32)
TOKENS = array("i", random.Random(0).choices(range(50_000), k=128)).tobytes()
BLOCKS = {A: [0, 1, 2, 3], B: [4, 5, 6, 7]}
FREE = [8, 9, 10, 11]


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> tuple[Rig, DeltaStore, MemoryArena]:
    """Pages with one passage twice, the second time a little different, both stored.

    Its parameter: whether K and V share a basis.
    """
    return make_rig(getattr(request, "param", False))


def make_rig(
    paired: bool = False, disk: DiskWorker | None = None, **extra: Any
) -> tuple[Rig, DeltaStore, MemoryArena]:
    artifact = step_artifact(MODEL, (8.0,), paired=paired)
    codec: TransformCodec = open_codec("kvtc2", torch.bfloat16, artifact=artifact, ratio=8.0)
    inner = MemoryArena(1 << 20)
    store = DeltaStore(inner, DeltaCoder(artifact, ENTROPY))
    made = Rig(codec, memory=store, disk=disk, **extra)
    k, v = MODEL.chunk(128, 128, seed=3)
    noise = torch.Generator().manual_seed(0)
    for key, share in ((A, 0.0), (B, 0.02)):
        own = [(x + share * x * torch.randn(x.shape, generator=noise)).bfloat16() for x in (k, v)]
        made.worker.transfers[0]._layout.scatter(BLOCKS[key], *own)  # type: ignore[attr-defined]
        item = StoreItem(key, 128, BLOCKS[key], tenant=b"us", tokens=TOKENS)
        step = StepMetadata(number=1, stores=[item])
        made.worker.begin_step(step)
        made.worker.store(step)
        assert [stored for stored, _, _ in made.settled().stored] == [key]
    return made, store, inner


def expected(made: Rig, key: RecordKey) -> list[torch.Tensor]:
    """Pages of a chunk that went through the codec alone."""
    layout = made.worker.transfers[0]._layout  # type: ignore[attr-defined]
    k, v = layout.unpack(layout.copy(BLOCKS[key]))
    chunk = made.codec.decode(made.codec.encode(k, v, 128))
    layout.scatter(FREE, chunk.k, chunk.v)
    return [cache[FREE].clone() for cache in made.caches.values()]


def load(made: Rig, key: RecordKey) -> set[int]:
    """Into blocks that hold nothing; gives those that must be recomputed."""
    for cache in made.caches.values():
        cache[FREE] = 0
    made.load(key, FREE, start=128)
    return made.finish_load()


def is_loaded(made: Rig, key: RecordKey) -> bool:
    wanted = expected(made, key)
    assert load(made, key) == set()
    return all(map(torch.equal, (cache[FREE] for cache in made.caches.values()), wanted))


@pytest.mark.parametrize("rig", [False, True], ids=["apart", "paired"], indirect=True)
def test_what_is_loaded_is_what_the_codec_gives(rig: Any) -> None:
    made, store, inner = rig
    whole = {key: len(store.read(key)) for key in (A, B)}
    counted = made.counters()
    assert counted["delta_chunks"] == 1
    assert counted["delta_bytes"] == sum(whole.values()) - inner.used > 0.3 * whole[B]
    assert "shared_chunks" not in counted
    assert is_loaded(made, A)
    assert is_loaded(made, B)
    made.worker.shutdown()


def test_an_evicted_representative_is_charged_to_what_needs_it(rig: Any) -> None:
    """Between lookup and load of a chunk that is a difference, what it differs from is evicted."""
    made, store, inner = rig
    wanted = expected(made, B)
    made.worker.begin_step(StepMetadata(number=1, evict=[A]))
    assert load(made, B) == set()
    assert all(map(torch.equal, (cache[FREE] for cache in made.caches.values()), wanted))
    made.worker.poll(idle=False)
    assert made.report().resized == [(B, 0, inner.used)]
    assert store.keys() == [B]
    made.worker.begin_step(StepMetadata(number=1, evict=[B]))
    assert inner.used == 0
    made.worker.shutdown()


@pytest.mark.parametrize("altered", [False, True], ids=["lost", "altered"])
def test_without_its_representative_a_chunk_is_recomputed(rig: Any, altered: bool) -> None:
    made, _, inner = rig
    kept = bytearray(inner.read(A))
    inner.remove([A])
    if altered:
        kept[len(kept) // 2] ^= 1
        inner.write(A, bytes(kept))
    made.counters()
    assert load(made, B) == set(FREE)
    for cache in made.caches.values():
        assert not cache[FREE].any()  # nothing of it was written
    report = made.report()
    assert report.bad == [B]
    assert report.disk_lost == []  # what is on disk is whole
    assert made.counters()[f"failed_loads/{LOST}"] == 1
    made.worker.shutdown()


def test_of_several_ranks_whole_blobs_are_written_once_all_have_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a step, so none is made whole there."""
    monkeypatch.setattr(test_worker, "SHAPE", replace(test_worker.SHAPE, tp_size=2))

    def opened() -> DiskStore:
        return DiskStore(tmp_path, made.codec.identity, capacity=1 << 22, min_free=0)

    disk = DiskWorker(Namespace(opened), 1, 5.0, 1 << 22)
    made, store, _ = make_rig(disk=disk, disk_path=str(tmp_path))
    blobs = {key: bytes(store.read(key)) for key in (A, B)}
    assert made.counters()["delta_chunks"] == 1
    assert chunk_files(tmp_path) == []

    def no_read(key: RecordKey) -> bytes:
        raise AssertionError("a difference is made whole within a step")

    monkeypatch.setattr(store, "read", no_read)
    made.worker.begin_step(StepMetadata(number=2, demote=[A, B], settled=[A, B]))
    until = time.monotonic() + 20
    while len(chunk_files(tmp_path)) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    monkeypatch.undo()
    made.worker.shutdown()
    again = opened()
    assert {key: bytes(again.read(key)) for key in (A, B)} == blobs
    again.close()


def test_the_scheduler_tells_the_tokens_where_they_are_wanted() -> None:
    for joint, length in (("delta", 4 * 128), ("off", 0)):
        side = scheduler(codec="kvtc2", joint=joint)
        request = FakeRequest("r", 257)
        stores = start(side, request, list(range(9)), 257).stores
        assert [len(item.tokens) for item in stores] == [length] * 2
        if length:
            assert array("i", stores[1].tokens).tolist() == list(range(128, 256))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"codec": "kvtc"}, "joint='delta' contradicts codec='kvtc'"),
        ({"codec": "raw"}, "joint='delta' contradicts codec='raw'"),
        (
            {"codec": "kvtc2", "disk_path": "/cache", "disk_write": "behind"},
            "joint='delta' contradicts disk_write='behind'",
        ),
    ],
)
def test_what_it_does_not_go_with(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"joint": "delta", **extra})
    assert load_config({**extra, "joint": "exact"}).joint == "exact"


BEHIND = {"disk_path": "/cache", "disk_write": "behind"}


@pytest.mark.parametrize(
    ("extra", "around", "phrase"),
    [
        ({}, {}, "joint is delta"),
        ({"disk_path": "/cache"}, {}, "joint is delta"),
        ({"codec": "kvtc"}, {}, "off: differences are for codec kvtc2"),
        ({"codec": "raw"}, {}, "off: differences are for codec kvtc2"),
        ({}, {"foreign": True}, "off: differences are for codec kvtc2"),
        ({}, {"groups": 2}, "off: differences are for one cache group, the model has 2"),
        ({}, {"device": "cuda"}, "off: differences are made on a CPU, and the codec runs on cuda"),
        (BEHIND, {}, "off: disk_write is behind"),
        ({}, {"one_copy": True}, "off: latents are kept once for all ranks"),
        ({"degrade": "memory"}, {}, "off: degrade is memory"),
    ],
)
def test_auto_is_delta_where_that_can_be(
    extra: dict[str, Any], around: dict[str, Any], phrase: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config({"codec": "kvtc2", **extra})
    assert config.joint == "auto"
    place = {"groups": 1, "device": "cpu", **around}
    with caplog.at_level("INFO", "vllm.kvtc"):
        assert with_joint(config, **place).joint == ("off" if "off" in phrase else "delta")
        assert not caplog.records
        with_joint(config, **place, says=True)
    assert phrase in caplog.text


def test_auto_is_off_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_tier, "delta_coder", lambda: None)
    assert with_joint(load_config({"codec": "kvtc2"}), 1, "cpu").joint == "off"


@pytest.mark.parametrize("joint", ["off", "exact", "delta"])
def test_what_is_asked_for_is_not_changed(joint: str) -> None:
    """What can't be is refused later, by name."""
    config = load_config({"codec": "kvtc2", "joint": joint})
    assert with_joint(config, 2, "cuda", foreign=True) is config
