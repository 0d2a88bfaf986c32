"""What scheduler and workers tell each other, once a step. Pickled by vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import xxhash
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvtc_vllm.tiers.policies import ChunkKey


@dataclass(frozen=True)
class AdapterUse:
    """A LoRA adapter by vLLM's number and a digest of its contents on each rank."""

    number: int
    parts: tuple[bytes, ...]

    @property
    def digest(self) -> bytes:
        """16 bytes over all parts; none without an adapter."""
        return xxhash.xxh3_128_digest(b"".join(self.parts)) if self.parts else b""


NO_ADAPTER = AdapterUse(0, ())
"""The model itself."""


@dataclass
class StoreItem:
    """Encode these blocks after this step's forward.

    start: token position of the chunk's first token. adapter: what the key assumes.
    """

    key: ChunkKey
    start: int
    block_ids: list[int]
    adapter: AdapterUse = NO_ADAPTER


@dataclass
class LoadItem:
    """Decode one chunk into some of its blocks.

    The chunk's blocks first_block .. first_block + len(block_ids) (counted inside
    the chunk) go to block_ids; its other blocks are not wanted.
    """

    key: ChunkKey
    start: int
    first_block: int
    block_ids: list[int]


@dataclass
class LoadJob:
    """All chunks that one request waits for. adapter: what their keys assume."""

    request_id: str
    items: list[LoadItem]
    adapter: AdapterUse = NO_ADAPTER


@dataclass
class DiskInventory(KVConnectorHandshakeMetadata):
    """A worker -> the scheduler, once at start: (key, bytes) on disk, least recent first."""

    entries: list[tuple[ChunkKey, int]]


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler -> workers. Applied in this order: reset, demote, evict, promote, loads, stores.

    number: of the step. tokens: that the step computes. epoch: number of times that all names
    were given up so far, for a reset or for other weights; work of older epochs is dropped.
    generation: a nonce in the names, new with every reset; empty before the first, so that an
    engine that starts again finds what it left. check: compare the weights in this step. adapters:
    LoRA requests of vLLM's whose contents the scheduler must know.
    demote: evicted chunks to write to disk first. promote: chunks to read from disk into
    memory. disk_remove: chunks to delete from disk. touch: chunks on disk that were used.
    idle: nothing else is scheduled, so the worker may wait a little for its threads.
    """

    number: int = 0
    tokens: int = 0
    epoch: int = 0
    generation: bytes = b""
    check: bool = False
    adapters: list[Any] = field(default_factory=list)
    evict: list[ChunkKey] = field(default_factory=list)
    loads: list[LoadJob] = field(default_factory=list)
    stores: list[StoreItem] = field(default_factory=list)
    demote: list[ChunkKey] = field(default_factory=list)
    promote: list[ChunkKey] = field(default_factory=list)
    disk_remove: list[ChunkKey] = field(default_factory=list)
    touch: list[ChunkKey] = field(default_factory=list)
    idle: bool = False


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Workers -> scheduler, summed over ranks by `aggregate`.

    stored: (key, rank, bytes), in memory. dropped: (key, rank), store or promotion given
    up. bad: chunks whose blob was missing or could not be decoded. disk_stored: (key, rank,
    bytes on disk). disk_lost: chunks that are not on disk any more, or of no use there.
    load_tokens, load_seconds: what finished loads did and took. step: number of the step,
    given whenever it computed tokens, so that its time can be taken.
    stale_since: first step in which the weights were found not to be those that the epoch's
    names stand for; 0 as long as they are. named_in: step in which this epoch's names were made,
    0 if not in this step. other_weights: then, whether they stand for other weights than the
    names before. adapters: of LoRA adapters by vLLM's number and rank digests that are news or
    were asked for; b"" for one that is not loaded any more, None for one that can't be told.
    """

    epoch: int
    stored: list[tuple[ChunkKey, int, int]] = field(default_factory=list)
    dropped: list[tuple[ChunkKey, int]] = field(default_factory=list)
    bad: list[ChunkKey] = field(default_factory=list)
    disk_stored: list[tuple[ChunkKey, int, int]] = field(default_factory=list)
    disk_lost: list[ChunkKey] = field(default_factory=list)
    load_tokens: int = 0
    load_seconds: float = 0.0
    step: int = 0
    stale_since: int = 0
    named_in: int = 0
    other_weights: bool = False
    adapters: dict[int, dict[int, bytes | None]] = field(default_factory=dict)

    def is_empty(self) -> bool:
        """True if there is nothing to tell."""
        return not (
            self.stored
            or self.dropped
            or self.bad
            or self.disk_stored
            or self.disk_lost
            or self.load_tokens
            or self.stale_since
            or self.named_in
            or self.adapters
        )

    def found_stale(self, step: int) -> None:
        """The weights of this step are not those of the names."""
        self.stale_since = min(self.stale_since or step, step)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Join the reports of two ranks of the same step."""
        assert isinstance(other, WorkerReport)
        if other.epoch != self.epoch:
            return self if self.epoch > other.epoch else other
        self.stored += other.stored
        self.dropped += other.dropped
        self.bad += other.bad
        self.disk_stored += other.disk_stored
        self.disk_lost += other.disk_lost
        self.load_tokens += other.load_tokens
        self.load_seconds += other.load_seconds
        self.step = max(self.step, other.step)
        if other.stale_since:
            self.found_stale(other.stale_since)
        self.named_in = max(self.named_in, other.named_in)
        self.other_weights = self.other_weights or other.other_weights
        for number, digests in other.adapters.items():
            self.adapters.setdefault(number, {}).update(digests)
        return self
