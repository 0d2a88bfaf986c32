"""One rank's part of the disk tier: blobs by key in one namespace of a shared root."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from kvtc_vllm.tiers.blob_store import Blob
from kvtc_vllm.tiers.disk import record
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.drop import drop_namespace
from kvtc_vllm.tiers.disk.filesystem import FileSystem, OsFileSystem
from kvtc_vllm.tiers.disk.in_use import InUseMark
from kvtc_vllm.tiers.disk.layout import (
    MIN_BLOB_BYTES,
    NAMESPACE_BYTES,
    TEMPORARY_DIRECTORY,
    check_blob,
    chunk_path,
    disk_bytes,
)
from kvtc_vllm.tiers.disk.ledger import LOCK_WAIT_SECONDS
from kvtc_vllm.tiers.disk.scan import ChunkFile, without_collector
from kvtc_vllm.tiers.disk.space import Recency, Space, Temporary
from kvtc_vllm.tiers.keys import RecordKey

DEFAULT_CAPACITY = 32 * 2**30
DEFAULT_MIN_FREE = 4 * 2**30


class DiskEntry(NamedTuple):
    """A chunk on disk. size: bytes it takes. last_used: seconds since the epoch."""

    key: RecordKey
    size: int
    last_used: float


class DiskStore:
    """A `BlobStore` of one namespace, synchronous. Safe for many threads; raises only DiskError.

    Opening makes the directories but reads no chunk: call `scan` once after it. The namespace
    is marked as in use until `close`.
    namespace: 16 bytes; the codec's identity, so that blobs can be told apart.
    capacity: bytes over the whole root, all namespaces, ranks and processes together; a
    caller with several ranks on one root gives each the total.
    min_free: bytes that stay free on the volume.
    """

    def __init__(
        self,
        root: str | Path,
        namespace: bytes,
        *,
        capacity: int = DEFAULT_CAPACITY,
        min_free: int = DEFAULT_MIN_FREE,
        namespace_record: record.NamespaceRecord | None = None,
        filesystem: FileSystem | None = None,
        lock_wait_seconds: float = LOCK_WAIT_SECONDS,
    ) -> None:
        if len(namespace) != NAMESPACE_BYTES:
            raise ValueError(f"a namespace has {NAMESPACE_BYTES} bytes, not {len(namespace)}")
        if capacity <= 0 or min_free < 0:
            raise ValueError(f"capacity {capacity} and min_free {min_free} must be positive")
        self.root = str(root)
        self.namespace = namespace
        self.capacity = capacity
        self._name = namespace.hex()
        self._directory = f"{self.root}/{self._name}"
        self._record = namespace_record
        self._fs = CheckedFileSystem(filesystem if filesystem is not None else OsFileSystem())
        self._mark = InUseMark(self._fs, self._directory)
        self._recency = Recency(self._fs)
        self._space = Space(
            self._fs,
            self.root,
            capacity,
            min_free,
            self._recency,
            self._note_eviction,
            lock_wait_seconds,
        )
        self._lock = threading.Lock()
        self._evicted: list[RecordKey] = []
        self._counts: Counter[str] = Counter()
        self._errors: Counter[tuple[str, str]] = Counter()
        self._closed = False
        try:
            self._prepare()
        except DiskError:
            self._mark.close()
            self._space.close()
            raise

    def write(self, key: RecordKey, blob: Blob) -> int:
        """Keep a blob; returns the bytes that it takes on disk and that removing it would free.

        The blob must carry this namespace and key in its header. If the key is there already
        (another process was faster), that file stays. Evictions that made room
        are in `take_evicted`, also if the write then failed.
        """
        # Other buffers are compared item by item, with Python's lock held.
        blob = bytes(blob)
        with self._counted("write"):
            path = chunk_path(self._directory, key)
            check_blob(blob, self.namespace, key)
            try:
                fresh = self._write(path, blob)
            except DiskError as error:
                if error.reason != "missing":
                    raise
                self._prepare()  # somebody deleted the directory
                fresh = self._write(path, blob)
        self._count("writes" if fresh else "writes_present")
        self._count("written_bytes", len(blob) if fresh else 0)
        return disk_bytes(len(blob))

    def read(self, key: RecordKey) -> bytes:
        """The blob, whole and of this namespace and key; a bad file is removed.

        Raises DiskError "missing" if there is none. Does not count as a use: see `touch`.
        """
        with self._counted("read"):
            path = chunk_path(self._directory, key)
            try:
                blob = self._read(path)
                check_blob(blob, self.namespace, key)
            except DiskError as error:
                if error.reason in ("corrupt", "foreign"):
                    self._remove_quietly(path)
                raise
        self._space.add_hits(self._name, 1)
        self._count("reads")
        self._count("read_bytes", len(blob))
        return blob

    def remove(self, keys: Iterable[RecordKey]) -> int:
        """Forget chunks; returns how many there were. On an error the others still go."""
        with self._counted("remove"):
            removed = self._space.remove(
                self._name, [chunk_path(self._directory, key) for key in keys]
            )
        self._count("removed", removed)
        return removed

    def drop(self) -> int:
        """Remove the whole namespace and its mark; returns how many chunks it had.

        Files that are not ours stay. Nothing is made anew unless something is written.
        """
        with self._counted("drop"):
            self._mark.clear()
            removed = drop_namespace(self._fs, self._space, self.root, self._name)
        self._count("removed", removed)
        return removed

    def touch(self, keys: Iterable[RecordKey]) -> list[RecordKey]:
        """Mark chunks as just used, the last one as the most recent; returns those gone.

        Takes no lock. What cannot be marked is counted and stays as old as it was.
        """
        gone = []
        for key in keys:
            try:
                with self._counted("touch"):
                    self._recency.touch(chunk_path(self._directory, key))
            except DiskError as error:
                if error.reason == "missing":
                    gone.append(key)
        return gone

    def scan(self) -> list[DiskEntry]:
        """All chunks, least recently used first.

        Also removes the temporaries of dead writers and corrects the ledger, so
        this is all that a restart needs. Holds the root's lock meanwhile.
        """
        with self._counted("scan"), without_collector():
            found = sorted(self._space.count(self._name))
            return [DiskEntry(key, disk_bytes(length), used / 1e9) for used, key, length in found]

    def used(self) -> int:
        """Bytes of the whole root by the ledger: never below what is on disk."""
        with self._counted("used"), self._space.locked() as page:
            return page.used

    def take_evicted(self) -> list[RecordKey]:
        """Keys of this namespace that this store evicted since the last call."""
        with self._lock:
            evicted, self._evicted = self._evicted, []
        return evicted

    def counts(self) -> dict[str, int]:
        """Totals since opening: writes, writes_present, written_bytes, reads, read_bytes,
        removed, evicted, evicted_bytes (of all namespaces)."""
        with self._lock:
            return dict(self._counts)

    def errors(self) -> dict[tuple[str, str], int]:
        """Failures since opening by operation (write, read, remove, drop, touch,
        scan, used, cleanup) and reason."""
        with self._lock:
            return dict(self._errors)

    def close(self) -> None:
        """Free the descriptors, and with them the mark; later calls raise "closed".

        Never raises, but uses the disk.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with suppress(DiskError), self._space.locked():
            pass  # takes the last hits to the ledger
        self._space.close()
        self._mark.close()

    def _prepare(self) -> None:
        self._fs.mkdir(self.root)
        ready = record.has_layout(self._fs, self.root)
        self._fs.mkdir(f"{self._directory}/{TEMPORARY_DIRECTORY}")
        self._mark.set()  # before the record, by which alone it could be taken for ended
        if ready and self._record is None:
            return
        with self._space.locked():
            if not record.has_layout(self._fs, self.root):
                record.write_layout(self._fs, self.root, self._directory)
            if self._record is not None:
                record.write_record(self._fs, self._directory, self._record)

    def _write(self, path: str, blob: bytes) -> bool:
        temporary = self._space.reserve(self._name, path, len(blob))
        if temporary is None:
            return False
        try:
            self._fill(temporary, blob)
            return self._space.publish(self._name, temporary, path)
        except BaseException:
            self._space.abandon(self._name, temporary)
            raise

    def _fill(self, temporary: Temporary, blob: bytes) -> None:
        fd = temporary.open_fd
        self._fs.write_all(fd, blob)
        if self._fs.read_all(fd, len(blob)) != blob:
            raise DiskError("io", "what was read back is not what was written")

    def _read(self, path: str) -> bytes:
        fd = self._fs.open(path, os.O_RDONLY)
        try:
            size = self._fs.fstat(fd).size
            if not MIN_BLOB_BYTES <= size <= self.capacity:
                raise DiskError("corrupt", f"{size} bytes cannot be a blob")
            return self._fs.read_all(fd, size)
        finally:
            self._fs.close_quietly(fd)

    def _remove_quietly(self, path: str) -> None:
        with suppress(DiskError), self._counted("cleanup"):
            self._space.remove(self._name, [path])

    def _note_eviction(self, namespace: str, chunk: ChunkFile) -> None:
        with self._lock:
            self._counts["evicted"] += 1
            self._counts["evicted_bytes"] += chunk.length
            if namespace == self._name:
                self._evicted.append(chunk.key)

    @contextmanager
    def _counted(self, operation: str) -> Iterator[None]:
        try:
            if self._closed:
                raise DiskError("closed", "the store was closed")
            yield
        except DiskError as error:
            with self._lock:
                self._errors[operation, error.reason] += 1
            raise

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number
