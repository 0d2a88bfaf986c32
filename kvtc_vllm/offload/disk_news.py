"""What a worker's disk tier found out, and how the scheduler is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from kvtc_vllm.offload.messages import Halved
from kvtc_vllm.offload.outbox import News
from kvtc_vllm.tiers.blob_store import BlobStore, StoreError
from kvtc_vllm.tiers.keys import RecordKey


class DiskHalved(NamedTuple):
    """As `Halved`, of one rank. size: bytes on disk."""

    key: RecordKey
    times: int
    last: bool
    size: int | None = None


@dataclass
class DiskNews:
    """What happened since the last time."""

    stored: list[tuple[RecordKey, int]] = field(default_factory=list)
    """Written, with the bytes that they take on disk."""
    found: list[tuple[RecordKey, int]] = field(default_factory=list)
    """There when the namespace was entered."""
    read: list[tuple[RecordKey, bytes]] = field(default_factory=list)
    """Read and verified."""
    failed: list[RecordKey] = field(default_factory=list)
    """Whose reads gave nothing."""
    lost: list[RecordKey] = field(default_factory=list)
    """Not on disk any more."""
    halved: list[DiskHalved] = field(default_factory=list)
    """Of what was to be halved."""
    errors: Counter[str] = field(default_factory=Counter)
    """Reason -> count."""
    written_bytes: int = 0
    """Of the blobs in `stored`; of a reference what it takes on disk."""
    shared_chunks: int = 0
    """Of `stored`, whose body another chunk on disk has."""
    shared_bytes: int = 0
    """On disk, that were not taken again for these."""
    repairs: int = 0
    """Damaged files that were removed or made anew."""


NO_NEWS = DiskNews()
TOLD_AT_ONCE = 128
"""Found and lost chunks in a step, by all ranks: one to two milliseconds of the scheduler."""


class Found:
    """What a namespace had when it was entered, perhaps a million chunks. Not thread-safe."""

    def __init__(self, entries: Iterable[tuple[RecordKey, int]] = ()) -> None:
        self._rest = iter(entries)
        self._overtaken: set[RecordKey] = set()
        self.told = False
        """Whether that was all."""

    def tell(self, news: DiskNews, most: int) -> None:
        """Add some to the news of a step, but nothing of which there was later news."""
        if self.told:
            return
        self._overtaken |= {key for key, _ in news.stored}.union(news.lost)
        self._overtaken |= {one.key for one in news.halved}
        some = list(islice(self._rest, most))
        news.found += [entry for entry in some if entry[0] not in self._overtaken]
        if len(some) < most:
            self.told = True
            self._overtaken.clear()


def keep(news: DiskNews, memory: BlobStore) -> tuple[list[tuple[RecordKey, int]], list[RecordKey]]:
    """Put what was read into memory: (key, bytes there) of what it holds, and what it does not."""
    kept, failed = [], list(news.failed)
    for key, blob in news.read:
        try:
            kept.append((key, memory.write(key, blob)))
        except StoreError:
            failed.append(key)
    return kept, failed


def tell(
    out: News,
    news: DiskNews,
    rank: int,
    kept: Sequence[tuple[RecordKey, int]],
    failed: Sequence[RecordKey],
) -> None:
    """Put all that happened into the worker's own news, which are locked.

    kept: of what was read, what memory holds, with its bytes there. failed: what it does not.
    """
    report = out.report
    report.stored += [(key, rank, size) for key, size in kept]
    report.dropped += [(key, rank) for key in failed]
    report.disk_stored += [(key, rank, size) for key, size in (*news.found, *news.stored)]
    report.disk_lost += news.lost
    report.disk_halved += [
        Halved(one.key, rank, one.times, one.last, one.size) for one in news.halved
    ]
    for name, amount in (
        ("promoted_chunks", len(kept)),
        ("promoted_bytes", sum(size for _, size in kept)),
        ("disk_written_chunks", len(news.stored)),
        ("disk_written_bytes", news.written_bytes),
        ("disk_shared_chunks", news.shared_chunks),
        ("disk_shared_bytes", news.shared_bytes),
        ("disk_repairs", news.repairs),
        ("disk_halved_chunks", sum(one.size is not None for one in news.halved)),
    ):
        if amount:
            out.stats.add(name, amount)
    for reason, count in news.errors.items():
        out.stats.add("disk_errors", count, label=reason)
