"""`degrade`: what a worker does with cold chunks, and which the scheduler names."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from kvtc_vllm.codec.container import ratio_of
from kvtc_vllm.codec.cpu.codec import CpuKvtc2Codec
from kvtc_vllm.codec.cpu.requantise import Requantiser
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.config import ConfigError, load_config
from kvtc_vllm.connector.halver import make_halver
from kvtc_vllm.offload.halving import MOST_AT_ONCE, HalvingOrders
from kvtc_vllm.offload.messages import Halved, StepMetadata, WorkerReport
from kvtc_vllm.offload.tier_indexes import tier_indexes
from kvtc_vllm.tiers.blob_store import StoreError
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.memory import MemoryArena
from tests.codec.synthetic import SyntheticModel
from tests.codec.v2.made_up import step_artifact
from tests.connector.test_worker import Rig

MODEL = SyntheticModel(num_layers=2, num_kv_heads=2, head_size=64)
KEY = RecordKey(b"a" * 32)
BLOCKS, FREE = [0, 1, 2, 3], [8, 9, 10, 11]
DEGRADE: dict[str, Any] = {"codec": "kvtc2", "ratio": 6, "degrade": "memory"}


AS_IT_WAS = Halved(KEY, 0, 2, last=True, size=None)


@cache
def codec(paired: bool = False) -> CpuKvtc2Codec:
    artifact = step_artifact(MODEL, (6.0,), halvings=2, paired=paired)
    made = open_codec("kvtc2", torch.bfloat16, artifact=artifact, ratio=6.0)
    assert isinstance(made, CpuKvtc2Codec)
    return made


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Any:
    """A worker with one chunk in memory. Its parameter: whether K and V share a basis."""
    artifact = codec(getattr(request, "param", False)).artifact
    own = open_codec("kvtc2", torch.bfloat16, artifact=artifact, ratio=6.0)
    assert isinstance(own, CpuKvtc2Codec)
    made = Rig(own, memory=MemoryArena(1 << 20), halver=Requantiser(own, ENTROPY))
    k, v = (x.bfloat16() for x in MODEL.chunk(128, 128, seed=3))
    made.worker.transfers[0]._layout.scatter(BLOCKS, k, v)  # type: ignore[attr-defined]
    made.store(KEY, BLOCKS, start=128)
    assert [key for key, _, _ in made.settled().stored] == [KEY]
    made.counters()
    yield made
    made.worker.shutdown()


def halve(made: Rig, key: RecordKey = KEY, epoch: int = 0) -> WorkerReport:
    made.worker.begin_step(StepMetadata(number=2, epoch=epoch, halve=[key]))
    report = made.report()
    while not report.halved:
        report.aggregate(made.report())
    return report


def load(made: Rig) -> set[int]:
    made.load(KEY, FREE, start=128)
    return made.finish_load()


@pytest.mark.parametrize("rig", [False, True], ids=["apart", "paired"], indirect=True)
def test_a_chunk_is_halved_twice_and_loads_each_time(rig: Rig) -> None:
    memory = rig.worker.arena
    assert isinstance(rig.codec, CpuKvtc2Codec)
    ratios = Requantiser(rig.codec, ENTROPY).ratios
    assert load(rig) == set()
    assert rig.counters()["halved_loaded_chunks/0"] == 1
    for times in (1, 2):
        before = memory.read(KEY)
        report = halve(rig)
        after = memory.read(KEY)
        assert report.halved == [Halved(KEY, 0, times, times == 2, len(after))]
        assert ratio_of(after) == ratios[times]
        assert load(rig) == set()
        counted = rig.counters()
        assert counted[f"halved_loaded_chunks/{times}"] == 1
        assert counted[f"halved_chunks/{times}"] == 1
        assert counted["halved_bytes"] == len(before) - len(after) > 0
    last = memory.read(KEY)
    report = halve(rig)
    assert report.halved == [AS_IT_WAS]
    assert memory.read(KEY) is last
    assert report.bad == []


def test_what_loads_is_the_halved_chunk(rig: Rig) -> None:
    halve(rig)
    blob = rig.worker.arena.read(KEY)
    expected = rig.codec.decode(blob, 128, 128, KEY)
    assert load(rig) == set()
    layout = rig.worker.transfers[0]._layout  # type: ignore[attr-defined]
    k, v = layout.unpack(layout.copy(FREE))
    assert torch.equal(k, expected.k)
    assert torch.equal(v, expected.v)


def test_a_damaged_chunk_is_dropped_and_counted(rig: Rig) -> None:
    memory = rig.worker.arena
    blob = bytearray(memory.read(KEY))
    blob[200] ^= 4
    memory.write(KEY, bytes(blob))
    report = halve(rig)
    assert report.bad == [KEY]
    assert report.halved == [AS_IT_WAS]
    assert rig.counters()["failed_loads/checksum"] == 1


def test_a_chunk_that_went_meanwhile_is_reported(rig: Rig) -> None:
    rig.worker.arena.remove([KEY])
    report = halve(rig)
    assert (report.halved, report.bad) == ([AS_IT_WAS], [])
    with pytest.raises(StoreError):
        rig.worker.arena.read(KEY)


def test_any_other_failure_leaves_the_chunk(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bytes:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Requantiser, "halve", fail)
    blob = rig.worker.arena.read(KEY)
    assert halve(rig).halved == [AS_IT_WAS]
    assert rig.worker.arena.read(KEY) is blob


def test_only_the_blob_that_was_read_is_replaced() -> None:
    memory = MemoryArena(100)
    old, other = b"x" * 60, b"y" * 60
    memory.write(KEY, old)
    assert memory.replace(KEY, old, b"z" * 30)
    assert (memory.read(KEY), memory.used) == (b"z" * 30, 30)
    memory.write(KEY, other)
    assert not memory.replace(KEY, old, b"z" * 30)
    assert not memory.replace(KEY, other, b"z" * 60)  # no smaller
    assert not memory.replace(RecordKey(b"b"), old, b"z")
    assert (memory.read(KEY), memory.used) == (other, 60)


def full(records: int, ranks: int = 1, of: int = 100) -> tuple[TierIndex, HalvingOrders]:
    """Memory with so many records; the budget has room for `of`."""
    config = load_config({**DEGRADE, "memory_bytes": 1000 * of * ranks})
    made = tier_indexes(config, ranks)
    for number in range(records):
        key = RecordKey(b"%d" % number)
        assert made.memory.reserve(key, 1000)
        for rank in range(ranks):
            made.memory.commit(key, rank, 1000)
    return made.memory, made.halving.memory


def to_half(keys: list[RecordKey], rank: int = 0) -> list[Halved]:
    return [Halved(key, rank, 1, last=False, size=500) for key in keys]


def test_nothing_is_named_while_there_is_room() -> None:
    _, orders = full(80)
    assert orders.take() == []
    plain = tier_indexes(load_config({"memory_bytes": 1000}), 1)
    assert plain.memory.reserve(KEY, 1000)
    assert plain.halving.memory.take() == plain.halving.disk.take() == []


def test_as_many_are_named_as_make_room_and_not_twice() -> None:
    index, orders = full(94)
    named = orders.take()
    # 6,500 bytes too many, of which each frees 500.
    assert named == [RecordKey(b"%d" % number) for number in range(13)]
    assert orders.take() == []
    orders.reported(to_half(named))
    assert index.used == 94_000 - 13 * 500
    assert orders.take() == []
    assert index.evictions == 0


def test_room_for_what_stores_reserve_at_once() -> None:
    index, orders = full(64)
    assert orders.take() == []
    for number in range(15):
        assert index.reserve(RecordKey(b"new %d" % number), 2000)
        index.commit(RecordKey(b"new %d" % number), 0, 1000)
    assert orders.take() == []  # one after the other: an eighth is room enough
    for number in range(10):
        assert index.reserve(RecordKey(b"at once %d" % number), 2000)
    # 79,000 bytes, and 20,000 that were reserved in a step: no more fits than 80,000.
    assert orders.take() == []
    for number in range(10):
        index.commit(RecordKey(b"at once %d" % number), 0, 1000)
    assert orders.take() == [RecordKey(b"%d" % number) for number in range(18)]
    assert index.evictions == 0


def test_what_freed_nothing_is_made_up_for() -> None:
    index, orders = full(94)
    named = orders.take()
    orders.reported(Halved(key, 0, 2, last=True, size=None) for key in named)
    again = orders.take()
    assert len(again) == len(named)
    assert not set(again) & set(named)
    assert index.used == 94_000


def test_every_rank_reports_first() -> None:
    index, orders = full(94, ranks=2)
    named = orders.take()
    assert len(named) == 13
    orders.reported(to_half(named))
    assert index.used == 2 * 94_000 - 13 * 500
    assert index.reserve(RecordKey(b"new"), 1000)
    for rank in range(2):
        index.commit(RecordKey(b"new"), rank, 1000)
    assert orders.take() == []
    orders.reported(to_half(named, rank=1))
    assert index.used == 2 * 95_000 - 2 * 13 * 500
    assert orders.take() == [RecordKey(b"13"), RecordKey(b"14")]


def test_no_more_than_some_run_at_once_and_a_reset_forgets_them() -> None:
    index, orders = full(1000, of=1000)
    named = orders.take()
    assert len(named) == MOST_AT_ONCE
    assert orders.take() == []
    index.clear()
    orders.clear()
    orders.reported(to_half(named))  # of before
    assert index.used == 0
    assert orders.take() == []


def test_the_disk_tier_names_its_own() -> None:
    extra = {**DEGRADE, "degrade": "both", "disk_path": "/nowhere", "disk_bytes": "1MiB"}
    made = tier_indexes(load_config(extra), 1)
    disk = made.disk
    assert disk is not None
    size = disk.capacity // 100
    keys = [RecordKey(b"%d" % number) for number in range(90)]
    for key in keys:
        disk.add(key, 0, size)
    named = made.halving.disk.take()
    assert named == keys[: len(named)]
    assert 4 <= len(named) <= 7
    assert made.halving.memory.take() == []
    used = disk.used
    report = WorkerReport(0, disk_halved=[Halved(key, 0, 1, False, size // 2) for key in named])
    made.halving.reported(report)
    assert disk.used == used - len(named) * (size - size // 2)
    assert disk.bytes_of(named[0]) == size // 2
    memory_alone = tier_indexes(load_config({**extra, "degrade": "memory"}), 1)
    assert memory_alone.disk is not None
    for key in keys:
        memory_alone.disk.add(key, 0, size)
    assert memory_alone.halving.disk.take() == []


def test_configurations_that_contradict_each_other() -> None:
    for extra, words in (
        ({**DEGRADE, "codec": "kvtc"}, ["degrade='memory'", "codec='kvtc'", "kvtc2"]),
        ({**DEGRADE, "joint": "exact"}, ["degrade='memory'", "joint='exact'"]),
        ({"degrade_floor": 64}, ["degrade_floor=64", "degrade='off'"]),
        ({**DEGRADE, "degrade": "both"}, ["degrade='both'", "disk_path", "set degrade='memory'"]),
        ({**DEGRADE, "degrade_floor": 6}, ["degrade_floor=6", "not above ratio=6", "higher"]),
        ({**DEGRADE, "degrade": "drop"}, ["degrade", "drop", "memory", "both"]),
    ):
        with pytest.raises(ConfigError) as error:
            load_config(extra)
        assert all(word in str(error.value) for word in words), error.value
    assert load_config({**DEGRADE, "degrade_floor": 64}).degrade_floor == 64
    with_quality = {"codec": "kvtc2", "quality": 0.01, "degrade": "memory", "degrade_floor": 12}
    assert load_config(with_quality).degrade_floor == 12


def test_engines_that_cannot_halve_say_why() -> None:
    config = load_config(DEGRADE)
    with pytest.raises(ConfigError, match="for engines on a CPU"):
        make_halver(config, [codec()], torch.device("cuda"))
    with pytest.raises(ConfigError, match="this one has 2"):
        make_halver(config, [codec(), codec()], torch.device("cpu"))
    low = load_config({**DEGRADE, "degrade_floor": 6.5})
    with pytest.raises(ArtifactError, match=r"degrade_floor=6\.5"):
        make_halver(low, [codec()], torch.device("cpu"))
    assert make_halver(load_config({}), [codec()], torch.device("cpu")) is None
    made = make_halver(config, [codec()], torch.device("cpu"))
    assert made is not None
    assert made.most_times == 2
