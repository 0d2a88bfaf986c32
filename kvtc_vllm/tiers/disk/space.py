"""Room under the cap: reservations, publication, eviction, and counting what is there.

Everything here that changes a file of the tier does so under the root's lock and keeps the
ledger at or above the truth: bytes are entered before they can exist and taken off
after they are gone.
"""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import itemgetter

from kvtc_vllm.tiers.disk import scan
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.layout import chunk_path, disk_bytes, new_temporary
from kvtc_vllm.tiers.disk.ledger import LOCK_WAIT_SECONDS, Account, Ledger, LedgerState
from kvtc_vllm.tiers.disk.scan import ChunkFile

MIN_CANDIDATES = 1024
CANDIDATE_SHARE = 8
"""A survey keeps the oldest eighth: it then costs the scan of about eight files an eviction."""


@dataclass
class Temporary:
    """A reservation: a locked file of the final length that holds nothing yet.

    size: bytes it is entered with in the ledger.
    """

    path: str
    fd: int | None
    size: int

    @property
    def open_fd(self) -> int:
        """The descriptor, before it is closed."""
        assert self.fd is not None
        return self.fd


class Recency:
    """Writes the last use of chunks: the modification times of their files. Thread-safe."""

    def __init__(self, fs: CheckedFileSystem) -> None:
        self._fs = fs
        self._last = 0
        self._lock = threading.Lock()

    def touch(self, path: str) -> None:
        """Stamp the file later than all that this process stamped before. Raises DiskError."""
        with self._lock:
            # The clock may stand still between two calls, and may be set back.
            self._last = max(time.time_ns(), self._last + 1)
            now = self._last
        self._fs.utime(path, now)


class Space:
    """The bytes of one root as one store sees them. Thread-safe.

    capacity, min_free: bytes. evicted: called under the lock with the namespace's directory
    name and the file, for each chunk evicted.
    """

    def __init__(
        self,
        fs: CheckedFileSystem,
        root: str,
        capacity: int,
        min_free: int,
        recency: Recency,
        evicted: Callable[[str, ChunkFile], None],
        lock_wait_seconds: float = LOCK_WAIT_SECONDS,
    ) -> None:
        self._fs = fs
        self._root = root
        self._capacity = capacity
        self._min_free = min_free
        self._recency = recency
        self._evicted = evicted
        self._ledger = Ledger(fs, root, lock_wait_seconds)
        self._candidates: deque[tuple[str, ChunkFile]] = deque()
        self._hits: Counter[str] = Counter()
        self._hits_lock = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[LedgerState]:
        """Hold the root's lock, with a ledger that covers every namespace."""
        with self._ledger.locked() as ledger:
            if not ledger.known:
                self._survey(ledger)
            with self._hits_lock:
                hits, self._hits = self._hits, Counter()
            for namespace, number in hits.items():
                ledger.account(namespace).hits += number
            yield ledger

    def add_hits(self, namespace: str, number: int) -> None:
        """Count verified reads; they enter the ledger when the lock is held next."""
        with self._hits_lock:
            self._hits[namespace] += number

    def close(self) -> None:
        """Close the ledger's file."""
        self._ledger.close()

    def reserve(self, namespace: str, target: str, length: int) -> Temporary | None:
        """Make room for a blob of `length` bytes, or None if `target` exists already.

        Raises DiskError "full" if the cap or the free space cannot be held, "missing" if the
        namespace's directory is gone.
        """
        size = disk_bytes(length)
        with self.locked() as ledger:
            if self._fs.stat(target) is not None:
                return None
            self._make_room(ledger, size)
            path = new_temporary(f"{self._root}/{namespace}")
            account = ledger.account(namespace)
            account.used += size
            try:
                ledger.save()
                fd = self._fs.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                temporary = Temporary(path, fd, size)
            except DiskError:
                account.used -= size
                raise
            try:
                # Its lock tells others that the writer lives, its length what it will take.
                if not self._fs.try_lock(temporary.open_fd):
                    raise DiskError("busy", f"{path} was locked by somebody else")
                self._fs.truncate(temporary.open_fd, length)
            except DiskError:
                self._discard(ledger, namespace, temporary)
                raise
            return temporary

    def publish(self, namespace: str, temporary: Temporary, target: str) -> bool:
        """Rename to `target`; False (and the temporary is gone) if that exists by now."""
        with self.locked() as ledger:
            fresh = self._fs.stat(target) is None
            if fresh:
                self._close(temporary)
                self._rename(temporary.path, target)
            else:
                self._discard(ledger, namespace, temporary)
        return fresh

    def abandon(self, namespace: str, temporary: Temporary) -> None:
        """Undo `reserve`, best effort: what cannot be undone now is an orphan for `scan`."""
        try:
            with self.locked() as ledger:
                self._discard(ledger, namespace, temporary)
        except DiskError:
            # Without the lock the ledger must not be touched; too high is safe.
            with suppress(DiskError):
                self._fs.unlink(temporary.path)
            self._close_quietly(temporary)

    def remove(self, namespace: str, paths: Iterable[str]) -> int:
        """Unlink chunks; returns how many there were. Others are removed if one fails."""
        removed = 0
        failure: DiskError | None = None
        with self.locked() as ledger:
            for path in paths:
                try:
                    removed += self._unlink(ledger, namespace, path) is not None
                except DiskError as error:
                    failure = error
        if failure is not None:
            raise failure
        return removed

    def count(self, namespace: str) -> list[ChunkFile]:
        """Remove orphans of one namespace and correct its account; returns its chunks."""
        with self.locked() as ledger:
            ledger.account(namespace).used, found = self._count(namespace)
        return found

    def count_all(self) -> None:
        """Remove orphans and correct the accounts of all namespaces."""
        with self.locked() as ledger:
            self._survey(ledger)

    def shrink(self) -> None:
        """Evict until the cap and the minimum of free space hold, as far as chunks go."""
        with self.locked() as ledger:
            self._survey(ledger)
            try:
                self._make_room(ledger, 0)
            except DiskError as error:
                if error.reason != "full":
                    raise

    def _make_room(self, ledger: LedgerState, size: int) -> None:
        if size > self._capacity:
            raise DiskError("full", f"{size} bytes exceed the tier's {self._capacity}")
        surveyed = False
        missing = self._missing(ledger, size)
        while missing > 0:
            if self._candidates:
                missing -= self._evict(ledger, *self._candidates.popleft())
            elif surveyed:
                raise DiskError("full", f"no room for {size} bytes and nothing left to evict")
            else:
                self._survey(ledger)
                surveyed = True
                missing = self._missing(ledger, size)

    def _missing(self, ledger: LedgerState, size: int) -> int:
        """Bytes to evict before `size` more fit. Free space counts once, then what is freed:
        file systems may take a while to give it back."""
        over_cap = ledger.used + size - self._capacity
        return max(over_cap, self._min_free + size - self._fs.free_bytes(self._root))

    def _evict(self, ledger: LedgerState, namespace: str, chunk: ChunkFile) -> int:
        """Bytes freed: 0 if the chunk is gone or was used since the survey."""
        path = chunk_path(f"{self._root}/{namespace}", chunk.key)
        there = self._fs.stat(path)
        if there is None or there.mtime_ns != chunk.mtime_ns:
            return 0
        freed = self._unlink(ledger, namespace, path)
        if freed is None:
            return 0
        self._evicted(namespace, chunk)
        return freed

    def _unlink(self, ledger: LedgerState, namespace: str, path: str) -> int | None:
        """Bytes freed, None if there was no such file."""
        there = self._fs.stat(path)
        if there is None or not self._fs.unlink(path):
            return None
        freed = disk_bytes(there.size)
        ledger.account(namespace).used -= freed
        return freed

    def _survey(self, ledger: LedgerState) -> None:
        """Count every namespace and choose the next candidates for eviction."""
        accounts: dict[str, Account] = {}
        found: list[tuple[str, ChunkFile]] = []
        for name in scan.namespaces(self._fs, self._root):
            used, chunks = self._count(name)
            accounts[name] = Account(used, ledger.account(name).hits)
            found += [(name, chunk) for chunk in chunks]
        ledger.accounts, ledger.known = accounts, True
        share = max(MIN_CANDIDATES, len(found) // CANDIDATE_SHARE)
        self._candidates = deque(heapq.nsmallest(share, found, key=itemgetter(1)))

    def _count(self, namespace: str) -> tuple[int, list[ChunkFile]]:
        """Remove orphans; bytes of what is left, temporaries included, and the chunks."""
        directory = f"{self._root}/{namespace}"
        writing = scan.remove_orphans(self._fs, directory)
        found = list(scan.chunks(self._fs, directory))
        return writing + sum(disk_bytes(chunk.length) for chunk in found), found

    def _rename(self, source: str, target: str) -> None:
        self._recency.touch(source)  # the kernel's own time stamps are milliseconds apart
        try:
            self._fs.rename(source, target)
        except DiskError as error:
            if error.reason != "missing":
                raise
            self._fs.mkdir(os.path.dirname(target))
            self._fs.rename(source, target)

    def _discard(self, ledger: LedgerState, namespace: str, temporary: Temporary) -> None:
        self._close_quietly(temporary)
        try:
            gone = self._fs.unlink(temporary.path)
        except DiskError:
            return  # still there and still entered; an orphan
        if gone:
            ledger.account(namespace).used -= temporary.size

    def _close(self, temporary: Temporary) -> None:
        fd, temporary.fd = temporary.fd, None
        if fd is not None:
            self._fs.close(fd)

    def _close_quietly(self, temporary: Temporary) -> None:
        with suppress(DiskError):
            self._close(temporary)
