"""Worker side of the disk tier: writes and reads of one rank, none of which blocks a step."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from vllm.logger import init_logger

from kvtc_vllm.tiers.disk import DiskError, DiskStore, IoHandle, IoPool
from kvtc_vllm.tiers.policies import ChunkKey

logger = init_logger("vllm.kvtc")

T = TypeVar("T")

START_SECONDS = 120.0
"""For finding what is on disk when the engine starts."""
WRITE_SECONDS = 30.0
"""A write that has not begun by then is given up."""
CLEAR_AGAIN_SECONDS = 5.0
"""Between attempts to empty the namespace after a reset."""
QUEUE = 1 << 16
"""Calls that may wait for a thread; blobs that wait are bounded by their bytes."""
REMOVE_AT_ONCE = 256
"""Chunks removed under one hold of the root's lock, for which others wait."""
LOST = frozenset({"missing", "corrupt", "foreign"})
"""Reasons of a failed read after which the chunk is not on disk any more."""


@dataclass
class DiskNews:
    """What happened since the last time.

    read: chunks read and verified. failed: reads that gave nothing. lost: chunks not on
    disk any more. errors: reason -> count.
    """

    stored: list[tuple[ChunkKey, int]] = field(default_factory=list)
    read: list[tuple[ChunkKey, bytes]] = field(default_factory=list)
    failed: list[ChunkKey] = field(default_factory=list)
    lost: list[ChunkKey] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    written_bytes: int = 0


NO_NEWS = DiskNews()


def open_store(make: Callable[[], DiskStore]) -> DiskStore:
    """Open at the engine's start. Raises DiskError if the directory can't be used in time."""
    pool = IoPool(1, 0, "kvtc-disk-open")
    opening = partial(_patiently, make, time.monotonic() + START_SECONDS)
    try:
        return pool.submit(opening, START_SECONDS).wait()
    finally:
        pool.close(0.0)


def _patiently(call: Callable[[], T], until: float) -> T:
    """Repeat while the root is busy: engines that start together wait for each other's scans."""
    while True:
        try:
            return call()
        except DiskError as error:
            if error.reason != "busy" or time.monotonic() >= until:
                raise


class DiskSide:
    """Owns a rank's store and its threads.

    Called by the engine's thread, `write` also by encoders; no call waits for the disk, but
    for `inventory` and `close`. Reads and writes have pools of their own: a write may wait
    for the root's lock. threads: of each pool. deadline_seconds: after which a read counts
    as failed. queue_bytes: of blobs that may wait to be written.

    After a reset nothing is read or written until everything that was on disk is deleted,
    and a write that was under way deletes its own chunk: what was computed before a reset
    is never offered after it.
    """

    def __init__(
        self, store: DiskStore, threads: int, deadline_seconds: float, queue_bytes: int
    ) -> None:
        self._store = store
        self._threads = threads
        self._deadline = deadline_seconds
        self._queue_bytes = queue_bytes
        self._readers = IoPool(threads, QUEUE, "kvtc-disk-read")
        self._writers = IoPool(threads, QUEUE, "kvtc-disk-write")
        self._reads: list[tuple[ChunkKey, IoHandle[bytes]]] = []
        self._lock = threading.Lock()  # for all that follows
        self._news = DiskNews()
        self._epoch = 0
        self._stale = False
        self._clear_after = 0.0
        self._writing: dict[ChunkKey, int] = {}
        self._queued = 0

    def inventory(self) -> list[tuple[ChunkKey, int]]:
        """(key, bytes) of what is on disk, least recently used first; clears leftovers.

        Called once, before the first step. Nothing if the disk fails: that is no reason not
        to serve.
        """
        until = time.monotonic() + START_SECONDS
        scan = partial(_patiently, self._store.scan, until)
        try:
            found = self._readers.submit(scan, START_SECONDS).wait()
        except DiskError as error:
            logger.warning("kvtc: what is on disk can't be listed, starting empty: %s", error)
            self._count(error)
            return []
        return [(entry.key, entry.size) for entry in found]

    def write(self, key: ChunkKey, blob: bytes, epoch: int) -> None:
        """Write when a thread is free; dropped and counted if too much waits.

        epoch: in which the blob was made; one of another is dropped.
        """
        size = len(blob)
        with self._lock:
            if epoch != self._epoch or key in self._writing:
                return
            full = self._queued + size > self._queue_bytes
            if full or self._stale:
                self._news.errors["queue_full" if full else "reset"] += 1
                return
            self._writing[key] = size
            self._queued += size
        self._submit_write(partial(self._write, key, blob, epoch), lambda: self._end_write(key))

    def read(self, keys: Sequence[ChunkKey]) -> None:
        """Begin to read chunks; `take_news` tells the outcome."""
        for key in keys:
            try:
                if self._stale:
                    raise DiskError("reset", "what was stored before is not deleted yet")
                handle = self._readers.submit(partial(self._store.read, key), self._deadline)
            except DiskError as error:
                self._fail(key, error)
            else:
                self._reads.append((key, handle))

    def remove(self, keys: Sequence[ChunkKey]) -> None:
        """Delete chunks when a thread is free."""
        if keys:
            self._submit_write(partial(self._remove, keys))

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        """Chunks were used, the last one most recently."""
        if keys:
            self._submit_write(partial(self._touch, keys))

    def begin_epoch(self, epoch: int) -> None:
        """Forget what was begun before, and delete all that is on disk."""
        self._reads.clear()
        with self._lock:
            self._epoch = epoch
            self._news = DiskNews(errors=self._news.errors)
            self._stale = True
            self._clear_after = 0.0
        self._clear_again()

    def take_news(self) -> DiskNews:
        """Outcomes since the last call."""
        if self._stale:
            self._clear_again()
        running = []
        stalled = bool(self._reads) and self._readers.stalled
        for key, handle in self._reads:
            if not handle.ready:
                if stalled:  # asked before the threads were known to hang
                    self._fail(key, DiskError("stalled", "all threads hang"))
                else:
                    running.append((key, handle))
                continue
            try:
                blob = handle.wait()
            except DiskError as error:
                self._fail(key, error)
            else:
                with self._lock:
                    self._news.read.append((key, blob))
        self._reads = running
        with self._lock:
            news, self._news = self._news, DiskNews()
        return news

    def close(self, last: Iterable[tuple[ChunkKey, bytes]], seconds: float) -> None:
        """Write what waits and then `last`, for at most `seconds`, and stop."""
        until = time.monotonic() + seconds
        source, lock = iter(last), threading.Lock()
        with suppress(DiskError):
            for _ in range(self._threads):
                self._writers.submit(partial(self._drain, source, lock, until), seconds)
            if self._writers.wait_idle(seconds):
                # By a thread of the pool as well: even closing may hang on a dead disk.
                self._writers.submit(self._store.close, until - time.monotonic()).wait()
        self._readers.close(0.0)
        self._writers.close(0.0)

    # ------------------------------------------------------- on the pools' threads

    def _write(self, key: ChunkKey, blob: bytes, epoch: int) -> None:
        try:
            if epoch != self._epoch:
                return
            size = self._store.write(key, blob)
            with self._lock:
                current = epoch == self._epoch
                if current:
                    self._news.stored.append((key, size))
                    self._news.written_bytes += len(blob)
            if not current:
                self._take_back(key)
        except DiskError as error:
            self._count(error)
        finally:
            self._note_evicted()
            self._end_write(key)

    def _take_back(self, key: ChunkKey) -> None:
        """Delete what was published after a reset."""
        try:
            self._store.remove([key])
        except DiskError as error:
            self._count(error)
            with self._lock:
                self._stale = True

    def _drain(
        self, source: Iterator[tuple[ChunkKey, bytes]], lock: threading.Lock, until: float
    ) -> None:
        while time.monotonic() < until and not self._stale:
            with lock:
                item = next(source, None)
            if item is None:
                return
            self._write(*item, self._epoch)

    def _clear(self, epoch: int) -> None:
        if not self._stale:
            return
        self._remove([entry.key for entry in self._store.scan()])
        with self._lock:
            if epoch == self._epoch:
                self._stale = False

    def _remove(self, keys: Sequence[ChunkKey]) -> None:
        for first in range(0, len(keys), REMOVE_AT_ONCE):
            self._store.remove(keys[first : first + REMOVE_AT_ONCE])

    def _touch(self, keys: Sequence[ChunkKey]) -> None:
        gone = self._store.touch(keys)
        with self._lock:
            self._news.lost += gone

    # -------------------------------------------------------------- on any thread

    def _clear_again(self) -> None:
        """Order the deletion of everything, if it is due."""
        with self._lock:
            now = time.monotonic()
            due = self._stale and now >= self._clear_after
            if due:
                self._clear_after = now + CLEAR_AGAIN_SECONDS
            epoch = self._epoch
        if due:
            self._submit_write(partial(self._clear, epoch))

    def _end_write(self, key: ChunkKey) -> None:
        with self._lock:
            self._queued -= self._writing.pop(key, 0)

    def _note_evicted(self) -> None:
        evicted = self._store.take_evicted()
        with self._lock:
            self._news.lost += evicted

    def _submit_write(
        self, call: Callable[[], None], refused: Callable[[], None] = lambda: None
    ) -> None:
        """refused: called instead, if no thread takes the call in time."""

        def counted() -> None:
            try:
                call()
            except DiskError as error:
                self._count(error)

        def give_up(error: DiskError) -> None:
            self._count(error)
            refused()

        try:
            self._writers.submit(counted, WRITE_SECONDS, give_up)
        except DiskError as error:
            give_up(error)

    def _fail(self, key: ChunkKey, error: DiskError) -> None:
        with self._lock:
            self._news.failed.append(key)
            self._news.errors[error.reason] += 1
            if error.reason in LOST:
                self._news.lost.append(key)

    def _count(self, error: DiskError) -> None:
        with self._lock:
            self._news.errors[error.reason] += 1
