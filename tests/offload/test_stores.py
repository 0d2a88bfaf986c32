"""Stores below a worker: another one in the arena's place, and the order of staging and loads."""

from __future__ import annotations

import random

import pytest
import torch

from kvtc_vllm.codec.container import CHECKSUM_BYTES, HEADER_BYTES
from kvtc_vllm.offload.keys import tenant_of
from kvtc_vllm.offload.messages import LoadItem, LoadJob, StepMetadata, StoreItem
from kvtc_vllm.tiers import once_store
from kvtc_vllm.tiers.blob_store import StoreError
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.memory import MemoryArena
from kvtc_vllm.tiers.once_store import OnceStore, body_name
from kvtc_vllm.tiers.policies.lru import LRUPolicy
from tests.connector.fakes import FakeRequest
from tests.connector.test_worker import CHUNK_BYTES, Rig

OWN_BYTES = HEADER_BYTES + CHECKSUM_BYTES
"""Of a blob, that no other shares."""


def once(capacity: int = 1 << 20) -> tuple[OnceStore, MemoryArena]:
    inner = MemoryArena(capacity)
    return OnceStore(inner, HEADER_BYTES, CHECKSUM_BYTES), inner


def blob(own: int, body: bytes) -> bytes:
    """As a codec makes it: only what is before and after the body tells whose it is."""
    return bytes([own]) * HEADER_BYTES + body + bytes([own]) * CHECKSUM_BYTES


def store(rig: Rig, key: bytes, tenant: bytes) -> int:
    """Store the first four blocks; returns the bytes that this adds."""
    item = StoreItem(key, 0, [0, 1, 2, 3], tenant=tenant)  # type: ignore[arg-type]
    step = StepMetadata(number=1, stores=[item])
    rig.worker.begin_step(step)
    rig.worker.store(step)
    ((stored, _, size),) = rig.settled().stored
    assert stored == key
    return size


def test_a_layer_takes_the_arena_s_place_and_tells_marginal_bytes() -> None:
    layer, inner = once()
    rig = Rig(memory=layer)
    whole = store(rig, b"a" * 32, b"us")
    assert store(rig, b"b" * 32, b"us") == OWN_BYTES
    assert inner.used == whole + OWN_BYTES
    counted = rig.counters()
    assert (counted["shared_chunks"], counted["shared_bytes"]) == (1, whole - OWN_BYTES)
    # Another's and nobody's are theirs alone.
    assert store(rig, b"c" * 32, b"them") == whole
    assert store(rig, b"d" * 32, b"") == whole
    assert store(rig, b"e" * 32, b"") == whole
    rig.worker.begin_step(StepMetadata(number=1, evict=[b"a" * 32]))  # type: ignore[list-item]
    rig.worker.poll(idle=False)
    assert rig.report().resized == [(b"b" * 32, 0, whole)]
    rig.load(b"b" * 32, [8, 9, 10, 11])
    assert rig.finish_load() == set()
    for cache in rig.caches.values():
        assert torch.equal(cache[8:12], cache[0:4])
    rig.worker.shutdown()


def test_what_is_charged_is_what_is_held() -> None:
    """Any order of writes, rewrites and removals; sizes as the scheduler learns them."""
    rng = random.Random(0)
    layer, inner = once()
    charged: dict[bytes, int] = {}
    expected: dict[bytes, bytes] = {}
    for _ in range(2000):
        key = bytes([rng.randrange(12)]) * 32
        if rng.random() < 0.6:
            made = blob(key[0], b"body" * rng.choice((1, 2, 3)))
            charged[key] = layer.write(key, made, rng.choice((b"us", b"them", b"")))  # type: ignore[arg-type]
            expected[key] = made
        else:
            assert layer.remove([key]) == (key in expected)  # type: ignore[list-item]
            charged.pop(key, None)
            expected.pop(key, None)
        charged.update(layer.take_resized())
        assert sum(charged.values()) == inner.used
        assert {name: layer.read(name) for name in list(expected)} == expected
        assert set(layer.keys()) == set(expected)
    layer.clear()
    assert inner.used == 0


def test_equal_hashes_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = once()
    monkeypatch.setattr(once_store, "body_name", lambda owner, body: body_name(owner, b"always"))
    first, second = blob(1, b"one body"), blob(2, b"and other")
    layer.write(b"a" * 32, first, b"us")  # type: ignore[arg-type]
    layer.write(b"b" * 32, second, b"us")  # type: ignore[arg-type]
    assert layer.read(b"a" * 32) == first  # type: ignore[arg-type]
    assert layer.read(b"b" * 32) == second  # type: ignore[arg-type]


def test_no_room_keeps_nothing() -> None:
    layer, inner = once(capacity=2 * OWN_BYTES)
    with pytest.raises(StoreError, match="full"):
        layer.write(b"a" * 32, blob(1, bytes(OWN_BYTES + 1)), b"us")  # type: ignore[arg-type]
    assert inner.used == 0
    with pytest.raises(StoreError, match="missing"):
        layer.read(b"a" * 32)  # type: ignore[arg-type]


def test_tenants_are_told_by_their_salt() -> None:
    requests = [FakeRequest("r", 10) for _ in range(4)]
    for request, salt in zip(requests, (None, "", "a", "a"), strict=True):
        request.cache_salt = salt  # type: ignore[attr-defined]
    nobody, empty, one, same = map(tenant_of, requests)
    assert one == same
    assert len({nobody, empty, one, tenant_of(FakeRequest("s", 10))}) == 3
    assert all(map(len, (nobody, empty, one)))


def test_the_index_takes_over_new_sizes() -> None:
    index = TierIndex(10_000, 1, LRUPolicy(10_000))
    for key, size in ((b"a", 1000), (b"b", 92)):
        index.reserve(key, 1000)  # type: ignore[arg-type]
        index.commit(key, 0, size)  # type: ignore[arg-type]
    index.discard(b"a")  # type: ignore[arg-type]
    index.resize(b"b", 0, 1000)  # type: ignore[arg-type]
    index.resize(b"a", 0, 1000)  # type: ignore[arg-type]
    assert (index.used, index.ready_bytes) == (1000, 1000)
    index.discard(b"b")  # type: ignore[arg-type]
    assert (index.used, index.ready_bytes) == (0, 0)


def test_what_is_due_is_staged_before_a_load_fills_its_blocks() -> None:
    rig = Rig()
    rig.store(b"other", [4, 5, 6, 7])
    rig.settled()
    before = {name: cache[0:4].clone() for name, cache in rig.caches.items()}
    step = StepMetadata(
        number=1,
        stage_first=[StoreItem(b"due", 0, [0, 1, 2, 3])],  # type: ignore[arg-type]
        loads=[LoadJob("r", [LoadItem(b"other", 0, 0, [0, 1, 2, 3])])],  # type: ignore[arg-type]
    )
    rig.worker.begin_step(step)
    assert rig.finish_load() == set()
    rig.settled()
    assert all(not torch.equal(rig.caches[name][0:4], was) for name, was in before.items())
    rig.load(b"due", [8, 9, 10, 11])
    assert rig.finish_load() == set()
    for name, was in before.items():
        assert torch.equal(rig.caches[name][8:12], was)
    rig.worker.shutdown()


@pytest.mark.parametrize("full", [False, True], ids=["same name", "full"])
def test_evictions_come_before_what_is_staged_ahead_of_the_forward(full: bool) -> None:
    """A store that was given up is repeated, or takes the room of what it evicts."""
    rig = Rig(memory_bytes=CHUNK_BYTES * 3 // 2)
    evicted = b"old" if full else b"due"
    rig.store(evicted, [4, 5, 6, 7])
    rig.settled()
    step = StepMetadata(
        number=2,
        tokens=1,
        stage_first=[StoreItem(b"due", 0, [0, 1, 2, 3])],  # type: ignore[arg-type]
        evict=[evicted],  # type: ignore[list-item]
    )
    rig.worker.before_forward(step)
    assert [key for key, _, _ in rig.settled().stored] == [b"due"]
    rig.worker.begin_step(step)
    rig.worker.store(step)
    rig.load(b"due", [8, 9, 10, 11])
    assert rig.finish_load() == set()
    rig.worker.shutdown()
