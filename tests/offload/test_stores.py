"""Stores below a worker: another one in the arena's place, and the order of staging and loads."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import xxhash

from kvtc_vllm.codec.container import CHECKSUM_BYTES, HEADER_BYTES
from kvtc_vllm.offload.messages import LoadItem, LoadJob, StepMetadata, StoreItem
from kvtc_vllm.tiers.blob_store import StoreError
from kvtc_vllm.tiers.memory import MemoryArena
from tests.connector.test_worker import Rig

OWN_BYTES = HEADER_BYTES + CHECKSUM_BYTES
"""Of a blob, that no other shares."""


class OnceStore:
    """Keeps equal bodies once, as a layer over an arena would. A toy: it has no lock."""

    def __init__(self, inner: MemoryArena) -> None:
        self._inner = inner
        self._own: dict[bytes, tuple[bytes, bytes, bytes]] = {}
        self._uses: dict[bytes, int] = {}

    def write(self, key: bytes, blob: bytes) -> int:
        # A header names its record, and the checksum at the end covers it.
        head, tail = blob[:HEADER_BYTES], blob[-CHECKSUM_BYTES:]
        body = blob[HEADER_BYTES:-CHECKSUM_BYTES]
        name = xxhash.xxh3_128_digest(body)
        self._own[key] = head, tail, name
        self._uses[name] = self._uses.get(name, 0) + 1
        return OWN_BYTES + (self._inner.write(name, body) if self._uses[name] == 1 else 0)  # type: ignore[arg-type]

    def read(self, key: bytes) -> bytes:
        if key not in self._own:
            raise StoreError("missing", "not here")
        head, tail, name = self._own[key]
        return head + self._inner.read(name) + tail  # type: ignore[arg-type]

    def remove(self, keys: Iterable[bytes]) -> int:
        there = [self._own.pop(key)[2] for key in keys if key in self._own]
        for name in there:
            self._uses[name] -= 1
            if not self._uses[name]:
                self._inner.remove([name])  # type: ignore[list-item]
        return len(there)

    def clear(self) -> None:
        self._own.clear()
        self._uses.clear()
        self._inner.clear()

    def keys(self) -> list[bytes]:
        return list(self._own)


def test_a_layer_takes_the_arena_s_place_and_tells_marginal_bytes() -> None:
    inner = MemoryArena(1 << 20)
    rig = Rig(memory=OnceStore(inner))  # type: ignore[arg-type]
    rig.store(b"a", [0, 1, 2, 3])
    ((_, _, whole),) = rig.report().stored
    rig.store(b"b", [0, 1, 2, 3])
    ((key, _, again),) = rig.report().stored
    assert (key, again) == (b"b", OWN_BYTES)
    assert inner.used == whole - OWN_BYTES
    rig.worker.begin_step(StepMetadata(number=1, evict=[b"a"]))  # type: ignore[list-item]
    rig.load(b"b", [8, 9, 10, 11])
    assert rig.finish_load() == set()
    for cache in rig.caches.values():
        assert torch.equal(cache[8:12], cache[0:4])
    rig.worker.shutdown()


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
