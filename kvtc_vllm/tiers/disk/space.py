"""The bytes under the cap: reservations, publication, removal.

Everything here that changes a file of the tier does so under the root's lock and keeps the
ledger at or above the truth: bytes are entered before they can exist and taken off
after they are gone. No hold of the lock lasts longer than some hundred removals or some thousand
files looked at.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from stat import S_ISDIR

from kvtc_vllm.tiers.disk import removal_log, scan
from kvtc_vllm.tiers.disk.bodies import Representative
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.count import Known, NamespaceCount, let_others
from kvtc_vllm.tiers.disk.evictor import REMOVED_AT_ONCE, Evictor
from kvtc_vllm.tiers.disk.filesystem import FileInfo
from kvtc_vllm.tiers.disk.layout import chunk_path, disk_bytes, fan_out_of, new_temporary
from kvtc_vllm.tiers.disk.ledger import LOCK_WAIT_SECONDS, Ledger, LedgerState
from kvtc_vllm.tiers.disk.places import make_directory
from kvtc_vllm.tiers.disk.recency import Recency, Temporary
from kvtc_vllm.tiers.disk.references import References
from kvtc_vllm.tiers.disk.scan import ChunkFile
from kvtc_vllm.tiers.keys import RecordKey


class Space:
    """The bytes of one root as one store sees them. Thread-safe.

    capacity, min_free: bytes. most_bytes: of a chunk, by the namespace's directory name; a larger
    file is none. evicted: called under the lock for each chunk evicted, with the bytes freed.
    repaired: called with what was wrong with a file that was made anew.
    """

    def __init__(
        self,
        fs: CheckedFileSystem,
        root: str,
        capacity: int,
        min_free: int,
        recency: Recency,
        *,
        most_bytes: Callable[[str], int],
        evicted: Callable[[ChunkFile, int], None],
        repaired: Callable[[str], None],
        lock_wait_seconds: float = LOCK_WAIT_SECONDS,
    ) -> None:
        self._fs = fs
        self._root = root
        self._capacity = capacity
        self._recency = recency
        self._most_bytes = most_bytes
        self._repaired = repaired
        self._ledger = Ledger(fs, root, lock_wait_seconds)
        self._evictor = Evictor(
            fs,
            root,
            capacity,
            min_free,
            recency,
            NamespaceCount(fs, root, self.locked, self._refuse, most_bytes),
            self.locked,
            self._take_away,
            evicted,
        )
        self._references = References(fs, root, most_bytes)
        self._told: dict[str, list[RecordKey]] = {}  # under the root's lock
        self._hits: Counter[str] = Counter()
        self._hits_lock = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[LedgerState]:
        """Hold the root's lock. The ledger has every namespace, but not all need be known."""
        with self._ledger.locked() as ledger:
            if not ledger.readable:
                if ledger.damage:
                    self._repaired(f"{self._root}/ledger.json: {ledger.damage}")
                ledger.rebuild(scan.namespaces(self._fs, self._root))
            with self._hits_lock:
                hits, self._hits = self._hits, Counter()
            for namespace, number in hits.items():
                ledger.account(namespace).hits += number
            try:
                yield ledger
            finally:
                self._tell()

    def add_hits(self, namespace: str, number: int) -> None:
        """Count verified reads; they enter the ledger when the lock is held next."""
        with self._hits_lock:
            self._hits[namespace] += number

    def close(self) -> None:
        """Close the ledger's file."""
        self._ledger.close()

    def used(self) -> int:
        """Bytes of the whole root by the ledger, counted first if it was lost."""
        while True:
            with self.locked() as ledger:
                if ledger.known:
                    return ledger.used
            self._evictor.count_unknown()

    def reserve(
        self, namespace: str, key: RecordKey, length: int, blob_length: int | None = None
    ) -> Temporary | None:
        """Make room for a file of `length` bytes, or None if the chunk is there already.

        blob_length: bytes of the blob, if the file is a reference.

        Raises DiskError "full" if the cap or the free space cannot be held, "missing" if the
        namespace's directory is gone, "foreign" if something is in the chunk's place that cannot
        be removed.
        """
        size = disk_bytes(length)
        if size > self._capacity:
            raise DiskError("full", f"{size} bytes exceed the tier's {self._capacity}")
        room = self._evictor.room(size)
        while True:
            with self.locked() as ledger:
                if self._is_there(ledger, namespace, key, blob_length or length):
                    return None
                known = ledger.known
                if known and room.make(ledger):
                    return self._create(ledger, namespace, length, size)
            if not known:
                self._evictor.count_unknown()
            elif not room.find():
                raise DiskError("full", f"no room for {size} bytes and nothing left to evict")

    def shrink(self) -> int:
        """Evict until the cap and the minimum of free space hold.

        Returns how many bytes too many are left because nothing can be evicted any more.
        """
        room = self._evictor.room(0)
        while True:
            with self.locked() as ledger:
                known = ledger.known
                if known and room.make(ledger):
                    return 0
            if not known:
                self._evictor.count_unknown()
            elif not room.find():
                return room.missing

    def give_way(self, size: int) -> bool:
        """Evict `size` bytes because the volume has no room for as much, whatever it says.

        False if there was nothing to evict.
        """
        return self._evictor.give_way(size)

    def publish(
        self,
        namespace: str,
        temporary: Temporary,
        key: RecordKey,
        of: Representative | None = None,
    ) -> bool:
        """Give the temporary the chunk's name; False (and it is gone) if there is one by now.

        of: what it refers to. Raises DiskError, also if that is not what it was.
        """
        target = self._path(namespace, key)
        with self.locked() as ledger:
            there = self._fs.stat(target)
            fresh = there is None or not there.is_regular
            if fresh:
                if there is not None:
                    self._take_away(ledger, namespace, key, there)
                if of is not None:
                    self._references.link(ledger, namespace, key, of)
                self._close(temporary)
                self._rename(temporary.path, target)
                ledger.account(namespace).published(fan_out_of(key), temporary.size)
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

    def remove(self, namespace: str, keys: Sequence[RecordKey]) -> int:
        """Remove chunks; returns how many there were. Others are removed if one fails."""
        removed = 0
        failure: DiskError | None = None
        for first in range(0, len(keys), REMOVED_AT_ONCE):
            if first:
                let_others()
            with self.locked() as ledger:
                for key in keys[first : first + REMOVED_AT_ONCE]:
                    try:
                        there = self._fs.stat(self._path(namespace, key))
                        if there is not None:
                            self._take_away(ledger, namespace, key, there)
                            removed += 1
                    except DiskError as error:
                        failure = error
        if failure is not None:
            raise failure
        return removed

    def count(self, namespace: str, known: Known | None = None) -> list[ChunkFile]:
        """Remove orphans of one namespace and correct its account.

        Returns its chunks, in no order. known: see `NamespaceCount`.
        """
        return self._evictor.count(namespace, known)

    def count_all(self) -> None:
        """Remove orphans and correct the accounts of all namespaces."""
        self._evictor.look_through()

    # ---------------------------------------------------- files, under the lock

    def _path(self, namespace: str, key: RecordKey) -> str:
        return chunk_path(f"{self._root}/{namespace}", key)

    def _is_there(self, ledger: LedgerState, namespace: str, key: RecordKey, length: int) -> bool:
        """Whether the chunk is there; what else is in its place goes, or raises DiskError."""
        there = self._fs.stat(self._path(namespace, key))
        if there is None:
            return False
        if there.is_regular and length in (
            there.size,
            self._references.blob_length(namespace, key, there),
        ):
            return True
        self._take_away(ledger, namespace, key, there)
        return False

    def _refuse(self, chunk: ChunkFile) -> None:
        """Remove a file that is too large for a chunk."""
        path = self._path(chunk.namespace, chunk.key)
        self._repaired(f"{path}: {chunk.length} bytes are too many for a chunk")
        with suppress(DiskError):
            self._fs.unlink(path)

    def _take_away(
        self, ledger: LedgerState, namespace: str, key: RecordKey, there: FileInfo
    ) -> int | None:
        """Remove what is in a chunk's place, see `TakeAway`. Raises DiskError."""
        path = self._path(namespace, key)
        if S_ISDIR(there.mode):
            try:
                self._fs.rmdir(path)
            except DiskError as error:
                raise DiskError("foreign", f"{path} is a directory: {error}") from error
            return 0
        of = self._references.of(namespace, key, there)
        stays = self._references.keep(namespace, key, there)
        if not self._fs.unlink(path):
            return None
        self._told.setdefault(namespace, []).append(key)
        freed = 0
        if there.is_regular and not stays:
            # More than a chunk can have was never entered.
            size = disk_bytes(min(there.size, self._most_bytes(namespace)))
            ledger.account(namespace).removed(fan_out_of(key), size)
            freed = disk_bytes(there.size)
        if of is not None:
            freed += self._references.unlink(ledger, namespace, key, of)
        return freed

    def _tell(self) -> None:
        told, self._told = self._told, {}
        for namespace, keys in told.items():
            with suppress(DiskError):
                removal_log.append(self._fs, f"{self._root}/{namespace}", keys)

    def _create(self, ledger: LedgerState, namespace: str, length: int, size: int) -> Temporary:
        path = new_temporary(f"{self._root}/{namespace}")
        account = ledger.account(namespace)
        account.used += size
        try:
            ledger.save()
            fd = self._fs.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            temporary = Temporary(path, fd, size)
        except DiskError:
            account.released(size)
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

    def _rename(self, source: str, target: str) -> None:
        self._recency.touch(source)  # the kernel's own time stamps are milliseconds apart
        try:
            self._fs.rename(source, target)
        except DiskError as error:
            if error.reason != "missing":
                raise
            make_directory(self._fs, self._root, os.path.dirname(target))
            self._fs.rename(source, target)

    def _discard(self, ledger: LedgerState, namespace: str, temporary: Temporary) -> None:
        self._close_quietly(temporary)
        try:
            gone = self._fs.unlink(temporary.path)
        except DiskError:
            return  # still there and still entered; an orphan
        if gone:
            ledger.account(namespace).released(temporary.size)

    def _close(self, temporary: Temporary) -> None:
        fd, temporary.fd = temporary.fd, None
        if fd is not None:
            self._fs.close(fd)

    def _close_quietly(self, temporary: Temporary) -> None:
        with suppress(DiskError):
            self._close(temporary)
