"""What left the disk, whoever removed it, until the scheduler is told."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.offload.disk_news import DiskNews
from kvtc_vllm.tiers.disk import DiskError
from kvtc_vllm.tiers.keys import RecordKey

LOST = frozenset({"missing", "corrupt", "foreign", "representative"})
"""Reasons of a failed read after which the chunk is not on disk any more."""


def reason_of(error: Exception) -> str:
    """Under which an exception of the tier is counted, whether a store declares it or not."""
    if isinstance(error, ContainerError):
        return "corrupt"
    return error.reason if isinstance(error, DiskError) else "other"


class DiskLosses:
    """Keys of one namespace, perhaps many thousand. Thread-safe.

    Until a loss is told, a read of the chunk fails. A chunk that is being written is not lost:
    where a smaller one takes its place, there is none for a moment.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: dict[RecordKey, None] = {}
        self._writing: dict[RecordKey, bool] = {}
        """Whether the chunk was found to be gone meanwhile."""
        self._looks: list[set[RecordKey]] = []
        """Of each look that is under way, what was written since it began."""

    def add(self, keys: Iterable[RecordKey]) -> None:
        """These are not on disk any more, unless they are being written."""
        with self._lock:
            self._add(keys)

    @contextmanager
    def looking(self) -> Iterator[list[RecordKey]]:
        """Takes what the block finds to be gone, but not what was written meanwhile."""
        written: set[RecordKey] = set()
        gone: list[RecordKey] = []
        with self._lock:
            self._looks.append(written)
        try:
            yield gone
        finally:
            with self._lock:
                self._looks = [look for look in self._looks if look is not written]
                self._add(key for key in gone if key not in written)

    @contextmanager
    def reading(self, key: RecordKey) -> Iterator[None]:
        """If the block raises a DiskError that says so, the chunk is gone."""
        with self.looking() as gone:
            try:
                yield
            except DiskError as error:
                if error.reason in LOST:
                    gone.append(key)
                raise

    @contextmanager
    def writing(self, key: RecordKey) -> Iterator[None]:
        """If the block ends well, the chunk is on disk."""
        with self._lock:
            self._writing[key] = False
        try:
            yield
        except BaseException:
            with self._lock:
                if self._writing.pop(key, False):
                    self._keys[key] = None
            raise
        with self._lock:
            self._writing.pop(key, None)
            self._keys.pop(key, None)
            for look in self._looks:
                look.add(key)

    def tell(self, news: DiskNews, most: int) -> None:
        """Add some to the news of a step: what reads did not find, then what left first."""
        with self._lock:
            some = [key for key in dict.fromkeys(news.failed) if key in self._keys]
            for key in some:
                del self._keys[key]
            rest = list(islice(self._keys, max(0, most - len(some))))
            for key in rest:
                del self._keys[key]
        news.lost += some + rest

    def _add(self, keys: Iterable[RecordKey]) -> None:
        for key in keys:
            if key in self._writing:
                self._writing[key] = True
            else:
                self._keys[key] = None
