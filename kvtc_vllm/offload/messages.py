"""What scheduler and workers tell each other, once per step.

The unit is the record: what one cache group contributes to a chunk. Lists of keys are lists of
record keys, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import xxhash

from kvtc_vllm.offload.pace import Pace
from kvtc_vllm.tiers.keys import RecordKey


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
    """Encode one record."""

    key: RecordKey
    start: int
    """Token position of the chunk's first token."""
    block_ids: list[int]
    """The record's blocks; where its cache group has several block tables, table by table."""
    adapter: AdapterUse = NO_ADAPTER
    """What the key assumes."""
    group: int = 0
    """Number of the cache group."""
    tenant: bytes = b""
    """Whose it is, by the request's cache salt; empty for nobody's."""
    tokens: bytes = b""
    """Ids of the chunk's tokens, int32; empty where no layer of the memory tier wants them."""


@dataclass
class LoadItem:
    """Decode one record into some of its blocks.

    The record's blocks first_block .. first_block + len(block_ids) (counted inside
    the chunk) go to block_ids; its other blocks are not wanted. Where its cache group has several
    block tables, block_ids are so many of each, table by table.
    """

    key: RecordKey
    start: int
    first_block: int
    block_ids: list[int]
    group: int = 0
    place: int | None = None
    """Where the first rank keeps it for all; None where each has its own, or if it is gone."""


@dataclass
class LoadJob:
    """All records that one request waits for.

    adapter: what their keys assume. patience: seconds after which what is not loaded yet is given
    up and recomputed; 0 for no limit. fits: False where the blocks are not those that the records
    fill; such a load fails.
    """

    request_id: str
    items: list[LoadItem]
    adapter: AdapterUse = NO_ADAPTER
    patience: float = 0.0
    fits: bool = True


class Halved(NamedTuple):
    """What became of a rank's part of a chunk that was to be halved.

    times: how often its blob was halved by now. last: whether it can't be once more. size: bytes
    that it takes now, as its tier counts them; None if that is as before.
    """

    key: RecordKey
    rank: int
    times: int
    last: bool
    size: int | None


@dataclass
class StepMetadata:
    """Scheduler -> workers: the orders of one step.

    Applied in this order: a new epoch; before the forward stage_first; before it or, on vLLM 0.29
    and later, after it was launched, demote, disk_remove, touch, promote, evict, loads; after it
    stores and kept. give_up comes before loads.
    """

    number: int = 0
    """Of the step."""
    tokens: int = 0
    """That the step computes."""
    epoch: int = 0
    """How often all names were given up so far, for a reset or for other weights. Work of older
    epochs is dropped."""
    generation: bytes = b""
    """A nonce in the names, new with every reset, and where several ranks keep parts with every
    change of weights. Empty before the first, so that an engine that starts again finds what it
    left."""
    check: bool = False
    """Compare the weights in this step."""
    adapters: list[Any] = field(default_factory=list)
    """LoRA requests of vLLM's whose contents the scheduler must know."""
    stage_first: list[StoreItem] = field(default_factory=list)
    """Stores whose blocks this step may overwrite."""
    gone: Sequence[RecordKey] = ()
    """Put off before, and not to be stored from their blocks after this step's forward."""
    kept: list[StoreItem] = field(default_factory=list)
    """Stores of what this step completes that are put off, until a later step's `stage_first`."""
    demote: list[RecordKey] = field(default_factory=list)
    """To be written to disk, before `evict`: what leaves memory, or what all of several ranks have
    settled."""
    settled: list[RecordKey] = field(default_factory=list)
    """With a disk and several ranks: what all of them have stored by now."""
    disk_remove: list[RecordKey] = field(default_factory=list)
    """To be deleted from disk."""
    touch: list[RecordKey] = field(default_factory=list)
    """On disk, and used; the last one most recently."""
    promote: list[RecordKey] = field(default_factory=list)
    """To be read from disk into memory."""
    evict: list[RecordKey] = field(default_factory=list)
    """To be forgotten in memory."""
    halve: list[RecordKey] = field(default_factory=list)
    """To be halved in memory, coldest first."""
    disk_halve: list[RecordKey] = field(default_factory=list)
    """To be halved on disk, coldest first."""
    give_up: Sequence[str] = ()
    """Requests whose loads end now: what is not loaded yet is recomputed."""
    loads: list[LoadJob] = field(default_factory=list)
    stores: list[StoreItem] = field(default_factory=list)
    idle: bool = False
    """Nothing else is scheduled, so the worker may wait a little for its threads."""


@dataclass
class WorkerReport:
    """Workers -> scheduler: the results of one step, summed over ranks by `aggregate`."""

    epoch: int
    stored: list[tuple[RecordKey, int, int]] = field(default_factory=list)
    """(key, rank, bytes) that memory holds now. From a rank that keeps nothing, since another one
    does for all: that nothing speaks against it here."""
    placed: list[tuple[RecordKey, int]] = field(default_factory=list)
    """(key, place) of what is stored and other ranks will read, see `tiers/shared_arena.py`."""
    dropped: list[tuple[RecordKey, int]] = field(default_factory=list)
    """(key, rank) of stores and promotions that were given up."""
    bad: list[RecordKey] = field(default_factory=list)
    """Blobs that were missing or could not be decoded."""
    disk_stored: list[tuple[RecordKey, int, int]] = field(default_factory=list)
    """(key, rank, bytes) that the disk holds now."""
    disk_lost: list[RecordKey] = field(default_factory=list)
    """Not on disk any more, or of no use there."""
    resized: list[tuple[RecordKey, int, int]] = field(default_factory=list)
    """(key, rank, bytes) of what takes other bytes in memory than when it was stored."""
    halved: list[Halved] = field(default_factory=list)
    """Of what was to be halved in memory."""
    disk_halved: list[Halved] = field(default_factory=list)
    """Of what was to be halved on disk."""
    loading: Pace = field(default_factory=Pace)
    """Of loads, in tokens."""
    reading: Pace = field(default_factory=Pace)
    """From disk into memory, in records."""
    step: int = 0
    """Number of the step, given whenever it computed tokens, so that its time can be taken."""
    stale_since: int = 0
    """First step in which the weights were found not to be those that the epoch's names stand
    for; 0 as long as they are."""
    named_in: int = 0
    """Step in which this epoch's names were made; 0 if not in this step."""
    other_weights: bool = False
    """Then, whether they stand for other weights than the names before."""
    adapters: dict[int, dict[int, bytes | None]] = field(default_factory=dict)
    """vLLM's number of a LoRA adapter -> rank -> digest, where that is news or was asked for; b""
    for one that is not loaded any more, None for one that can't be told."""

    def is_empty(self) -> bool:
        """True if there is nothing to tell."""
        return not (
            self.stored
            or self.resized
            or self.halved
            or self.disk_halved
            or self.dropped
            or self.bad
            or self.disk_stored
            or self.disk_lost
            or self.loading
            or self.reading
            or self.stale_since
            or self.named_in
            or self.adapters
        )

    def found_stale(self, step: int) -> None:
        """Note that the weights of this step are not those of the names."""
        self.stale_since = min(self.stale_since or step, step)

    def aggregate(self, other: WorkerReport) -> WorkerReport:
        """Join the report of another rank of the same step; the newer epoch's wins."""
        if other.epoch != self.epoch:
            return self if self.epoch > other.epoch else other
        self.stored += other.stored
        self.placed += other.placed
        self.resized += other.resized
        self.halved += other.halved
        self.disk_halved += other.disk_halved
        self.dropped += other.dropped
        self.bad += other.bad
        self.disk_stored += other.disk_stored
        self.disk_lost += other.disk_lost
        self.loading.join(other.loading)
        self.reading.join(other.reading)
        self.step = max(self.step, other.step)
        if other.stale_since:
            self.found_stale(other.stale_since)
        self.named_in = max(self.named_in, other.named_in)
        self.other_weights = self.other_weights or other.other_weights
        for number, digests in other.adapters.items():
            self.adapters.setdefault(number, {}).update(digests)
        return self
