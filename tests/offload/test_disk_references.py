"""`joint: exact` with a disk: equal bodies of one tenant are on disk once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvtc_vllm.codec.container import CHECKSUM_BYTES, HEADER_BYTES
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.config import load_config
from kvtc_vllm.connector.memory_tier import make_memory
from kvtc_vllm.offload.disk_worker import DiskWorker
from kvtc_vllm.offload.geometry import codec_geometry
from kvtc_vllm.offload.messages import StepMetadata, StoreItem
from kvtc_vllm.offload.namespace import Namespace
from kvtc_vllm.tiers.disk import DiskStore, disk_bytes
from kvtc_vllm.tiers.disk import reference as disk_reference
from kvtc_vllm.tiers.keys import RecordKey
from tests.connector.test_worker import GROUP, SHAPE, Rig, wait_for
from tests.reliability.conftest import scratch
from tests.reliability.disk import bytes_on_disk, ledger_bytes, links

__all__ = ["scratch"]

KEYS = [RecordKey(bytes((number,)) * 32) for number in range(1, 5)]
FIRST, SECOND, OTHERS, NOBODYS = KEYS
TENANTS = (b"us", b"us", b"them", b"")
CAPACITY = 1 << 22


class Tiers:
    """A worker with a memory tier of `joint` and a disk, which one thread writes."""

    def __init__(self, root: Path, joint: str, disk_write: str) -> None:
        self.root = root
        self.disk_write = disk_write
        codec = RawCodec(codec_geometry(GROUP), torch.bfloat16)
        extra = {"joint": joint, "disk_path": str(root), "disk_write": disk_write}
        config = load_config({"codec": "raw", "memory_bytes": "1MiB", **extra})
        namespace = Namespace(
            lambda: DiskStore(root, codec.identity, capacity=CAPACITY, min_free=0)
        )
        self.rig = Rig(
            codec,
            memory=make_memory(config, SHAPE, [codec]),
            disk=DiskWorker(namespace, 1, 5.0, CAPACITY),
            **extra,
        )
        self.lost: set[bytes] = set()
        self.stats: Counter[str] = Counter()

    def store(self, count: int) -> None:
        """The first chunks, which have one body, into memory."""
        for key, tenant in zip(KEYS[:count], TENANTS, strict=False):
            step = StepMetadata(number=1, stores=[StoreItem(key, 0, [0, 1, 2, 3], tenant=tenant)])
            self.rig.worker.begin_step(step)
            self.rig.worker.store(step)
            self.rig.settled()

    def on_disk(self, count: int) -> dict[bytes, int]:
        """Key and bytes of what the worker reports, once it is so much."""
        found: dict[bytes, int] = {}
        wait_for(lambda: self._look(found) >= count)
        return found

    def _look(self, found: dict[bytes, int]) -> int:
        self.rig.worker.poll(idle=True)
        self.stats.update(self.rig.counters())
        report = self.rig.worker.take_report()
        if report is not None:
            found |= {key: size for key, _, size in report.disk_stored}
        return len(found)

    def evict(self, count: int) -> None:
        """The first chunks from memory, which are written now if they were not."""
        keys = list(KEYS[:count])
        demote = keys if self.disk_write == "behind" else []
        self.rig.worker.begin_step(StepMetadata(number=1, demote=demote, evict=keys))

    def promote(self, key: RecordKey) -> bool:
        """Read into memory; False if that gave nothing."""
        self.rig.worker.begin_step(StepMetadata(number=1, promote=[key]))

        def ended() -> str:
            self.rig.worker.poll(idle=True)
            self.stats.update(self.rig.counters())
            report = self.rig.worker.take_report()
            if report is None:
                return ""
            self.lost |= set(report.disk_lost)
            return "stored" if report.stored else "dropped" if report.dropped else ""

        return wait_for(ended) == "stored"


@pytest.fixture(params=["through", "behind"])
def tiers(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Tiers]:
    made = Tiers(scratch, "exact", request.param)
    yield made
    made.rig.worker.shutdown()


def written(tiers: Tiers, count: int = 4) -> dict[bytes, int]:
    tiers.store(count)
    tiers.evict(count)
    return tiers.on_disk(count)


def test_a_tenants_second_chunk_takes_one_block(tiers: Tiers) -> None:
    sizes = written(tiers)
    whole = sizes[FIRST]
    assert sizes == {FIRST: whole, SECOND: disk_bytes(1), OTHERS: whole, NOBODYS: whole}
    assert bytes_on_disk(tiers.root) == ledger_bytes(tiers.root) == sum(sizes.values())
    assert tiers.stats["disk_written_chunks"] == 4
    assert tiers.stats["disk_shared_chunks"] == 1
    assert tiers.stats["disk_shared_bytes"] == whole - disk_bytes(1)


def test_what_is_loaded_is_what_was_stored(tiers: Tiers) -> None:
    written(tiers)
    tiers.rig.worker.begin_step(StepMetadata(number=1, disk_remove=[FIRST]))
    assert tiers.promote(SECOND)
    tiers.rig.load(SECOND, [8, 9, 10, 11])
    assert tiers.rig.finish_load() == set()
    for cache in tiers.rig.caches.values():
        assert torch.equal(cache[8:12], cache[0:4])


@pytest.mark.parametrize("damage", ["gone", "altered"])
def test_what_it_refers_to_is_lost(damage: str, tiers: Tiers) -> None:
    written(tiers)
    (link,) = links(tiers.root)
    content = bytearray(link.read_bytes())
    content[len(content) // 2] ^= 1
    link.write_bytes(content) if damage == "altered" else link.unlink()
    assert not tiers.promote(SECOND)
    assert tiers.lost == {SECOND}
    assert tiers.stats["disk_errors/representative"] == 1


@pytest.mark.parametrize("joint", ["off", "exact"])
def test_at_the_end(joint: str, scratch: Path) -> None:
    """What is written because the engine stops is shared as well."""
    made = Tiers(scratch, joint, "behind")
    made.store(2)
    made.rig.worker.shutdown()
    assert len(links(scratch)) == (joint == "exact")
    store = DiskStore(scratch, made.rig.codec.identity, capacity=CAPACITY, min_free=0)
    assert {entry.key for entry in store.scan()} == {FIRST, SECOND}
    assert (
        store.read(FIRST)[HEADER_BYTES:-CHECKSUM_BYTES]
        == (store.read(SECOND)[HEADER_BYTES:-CHECKSUM_BYTES])
    )


def test_off_shares_nothing(scratch: Path) -> None:
    made = Tiers(scratch, "off", "through")
    sizes = written(made)
    assert len(set(sizes.values())) == 1
    assert links(scratch) == []
    made.rig.worker.shutdown()


def test_a_body_on_disk_is_one_in_memory() -> None:
    """Both sides know by themselves where a blob's body begins and ends."""
    assert (disk_reference.HEAD_BYTES, disk_reference.TAIL_BYTES) == (HEADER_BYTES, CHECKSUM_BYTES)
