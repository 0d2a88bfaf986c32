"""Engines on one directory and one cap: what their indexes say is on disk, is."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest

from kvtc_vllm.offload.disk_worker import DiskWorker
from kvtc_vllm.offload.namespace import Namespace
from kvtc_vllm.tiers import policies
from kvtc_vllm.tiers.disk import DiskStore
from kvtc_vllm.tiers.disk_index import DiskIndex
from tests.reliability.blobs import NAMESPACE, OTHER_NAMESPACE, blob_of, key_of

CAPACITY = 1000 * 4096
KEYS = 2000
LONGEST = 4000


class Replica:
    """A worker's side of the disk and the scheduler's index of it, stepped by hand."""

    def __init__(self, root: Path, namespace: bytes, seed: int) -> None:
        self.namespace = namespace
        self.chance = random.Random(seed)
        store = partial(DiskStore, root, namespace, capacity=CAPACITY, min_free=0)
        self.worker = DiskWorker(Namespace(store), 2, 20.0, 1 << 24)
        self.index = DiskIndex(CAPACITY, 1, policies.REGISTRY["lru"](CAPACITY))
        self.index.restore({0: self.worker.inventory()})
        self.good = self.missing = 0

    def step(self) -> None:
        """What the reports of a step and the orders of the next do."""
        news = self.worker.take_news()
        for key, size in (*news.found, *news.stored):
            self.index.add(key, 0, size)
        for key in news.lost:
            self.index.lose(key)
        for key, blob in news.read:
            assert blob == blob_of(key, self.namespace, LONGEST)
        self.good += len(news.read)
        self.missing += len(news.failed)
        self.worker.remove(self.index.take_removed())

    def write(self) -> None:
        key = key_of(self.chance.randrange(KEYS))
        if not self.index.is_ready(key):
            self.worker.write(key, blob_of(key, self.namespace, LONGEST), 0)

    def read(self) -> None:
        """What a look-up finds on disk."""
        key = key_of(self.chance.randrange(KEYS))
        if self.index.is_ready(key):
            self.worker.read([key])
            self.worker.touch(self.index.hit([key]))

    def catch_up(self) -> None:
        """Wait for the disk: an engine makes chunks slower than it writes them."""
        assert self.worker._writers.wait_idle(20)


@pytest.mark.slow
@pytest.mark.parametrize("namespaces", [(NAMESPACE, OTHER_NAMESPACE), (NAMESPACE, NAMESPACE)])
def test_promotions_find_their_file(namespaces: tuple[bytes, bytes], scratch: Path) -> None:
    replicas = [Replica(scratch / "tier", name, seed) for seed, name in enumerate(namespaces)]
    rounds = 0
    while min(replica.good for replica in replicas) < 2000:
        rounds += 1
        for replica in replicas:
            replica.write()
            replica.read()
            replica.step()
        if rounds % 4 == 0:
            for replica in replicas:
                replica.catch_up()
        assert rounds < 60_000
    for replica in replicas:
        assert replica.missing <= 0.01 * replica.good, (replica.missing, replica.good)
        replica.worker.close((), 5)
    assert (
        sum(len(replica.index) for replica in replicas[: len(set(namespaces))]) <= 1010
    )  # some were not told yet
