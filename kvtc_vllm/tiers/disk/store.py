"""One rank's part of the disk tier: blobs by key in one namespace of a shared root."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from kvtc_vllm.tiers.blob_store import Blob
from kvtc_vllm.tiers.disk import file_list, record
from kvtc_vllm.tiers.disk.bodies import Bodies
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.drop import drop_namespace
from kvtc_vllm.tiers.disk.file_list import FileList
from kvtc_vllm.tiers.disk.filesystem import FileSystem, OsFileSystem
from kvtc_vllm.tiers.disk.in_use import InUseMark
from kvtc_vllm.tiers.disk.layout import (
    LAYOUT_FILE,
    LIST_FILE,
    NAMESPACE_BYTES,
    RECORD_FILE,
    TEMPORARY_DIRECTORY,
    check_blob,
    chunk_path,
    disk_bytes,
)
from kvtc_vllm.tiers.disk.ledger import LOCK_WAIT_SECONDS
from kvtc_vllm.tiers.disk.places import make_directory
from kvtc_vllm.tiers.disk.reading import read_blob
from kvtc_vllm.tiers.disk.recency import Recency
from kvtc_vllm.tiers.disk.removal_log import RemovalReader
from kvtc_vllm.tiers.disk.scan import ChunkFile, last_use, without_collector
from kvtc_vllm.tiers.disk.sorting import in_order
from kvtc_vllm.tiers.disk.space import Space
from kvtc_vllm.tiers.disk.turns import short_turns
from kvtc_vllm.tiers.disk.writing import ChunkWriter
from kvtc_vllm.tiers.inventory import Inventory
from kvtc_vllm.tiers.keys import RecordKey

T = TypeVar("T")

logger = logging.getLogger("vllm.kvtc")

DEFAULT_CAPACITY = 32 * 2**30
DEFAULT_MIN_FREE = 4 * 2**30
LISTED_FROM = 16_384
"""Chunks from which on a list of them is kept: fewer are asked for in a second."""


class DiskEntry(msgspec.Struct, frozen=True, gc=False):
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
    most_bytes: of a blob; a larger file in this namespace is damaged. Unset: the capacity.
    """

    def __init__(
        self,
        root: str | Path,
        namespace: bytes,
        *,
        capacity: int = DEFAULT_CAPACITY,
        min_free: int = DEFAULT_MIN_FREE,
        most_bytes: int | None = None,
        namespace_record: record.NamespaceRecord | None = None,
        filesystem: FileSystem | None = None,
        lock_wait_seconds: float = LOCK_WAIT_SECONDS,
    ) -> None:
        if len(namespace) != NAMESPACE_BYTES:
            raise ValueError(f"a namespace has {NAMESPACE_BYTES} bytes, not {len(namespace)}")
        if capacity <= 0 or min_free < 0:
            raise ValueError(f"capacity {capacity} and min_free {min_free} must be positive")
        self.root = str(Path(root))
        self.namespace = namespace
        self.capacity = capacity
        self._most_bytes = min(capacity, most_bytes or capacity)
        self._name = namespace.hex()
        self._directory = f"{self.root}/{self._name}"
        self._record = namespace_record
        self._fs = CheckedFileSystem(
            filesystem if filesystem is not None else OsFileSystem(self.root)
        )
        self._mark = InUseMark(self._fs, self._directory)
        self._recency = Recency(self._fs)
        self._space = Space(
            self._fs,
            self.root,
            capacity,
            min_free,
            self._recency,
            most_bytes=self._bound_of,
            evicted=self._note_eviction,
            repaired=self._note_repair,
            lock_wait_seconds=lock_wait_seconds,
        )
        self._writer = ChunkWriter(
            self._fs,
            self._space,
            self._directory,
            Bodies(self._fs, self._recency, self._directory, namespace),
            self._prepare,
            lambda error: self._note_error("refer", error),
        )
        self._removals = RemovalReader(self._fs, self._directory)
        self._removals_lock = threading.Lock()
        self._bounds: dict[str, int] = {self._name: self._most_bytes}
        self._number = 0  # of chunks, about
        self._changed = True  # since the list was written
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

    def write(self, key: RecordKey, blob: Blob, tenant: bytes = b"") -> int:
        """Keep a blob; returns the bytes that it takes on disk and that removing it would free.

        The blob must carry this namespace and key in its header. If the key is there already
        (another process was faster), that file stays. Evictions that made room
        are in `take_evicted`, also if the write then failed.
        tenant: where this store has written a chunk of the same tenant with the same body, a
        reference to that one is kept instead (`reference`).
        """
        # Other buffers are compared item by item, with Python's lock held.
        blob = bytes(blob)
        with self._counted("write"):
            chunk_path(self._directory, key)  # raises if the key can be no name
            check_blob(blob, self.namespace, key)
            fresh, length = self._writer.write(key, blob, tenant)
        self._changed = True
        self._number += fresh
        self._count("writes" if fresh else "writes_present")
        self._count("written_bytes", length if fresh else 0)
        return disk_bytes(length)

    def read(self, key: RecordKey) -> bytes:
        """The blob, whole and of this namespace and key; a bad file is removed.

        Raises DiskError "missing" if there is none, "representative" if it refers to what is gone
        or damaged. Does not count as a use: see `touch`.
        """
        with self._counted("read"):
            try:
                blob = read_blob(self._fs, self._directory, key, self._most_bytes)
                check_blob(blob, self.namespace, key)
            except DiskError as error:
                if error.reason in ("corrupt", "foreign", "representative"):
                    self._remove_quietly(key)
                raise
        self._space.add_hits(self._name, 1)
        self._count("reads")
        self._count("read_bytes", len(blob))
        return blob

    def remove(self, keys: Iterable[RecordKey]) -> int:
        """Forget chunks; returns how many there were. On an error the others still go."""
        with self._counted("remove"):
            removed = self._space.remove(self._name, list(keys))
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
        self._changed = True
        for key in keys:
            try:
                with self._counted("touch"):
                    self._recency.touch(chunk_path(self._directory, key))
            except DiskError as error:
                if error.reason == "missing":
                    gone.append(key)
        return gone

    def scan(self) -> list[DiskEntry]:
        """All chunks, least recently used first; see `inventory`."""
        return self._scanned(
            lambda found: [
                DiskEntry(chunk.key, disk_bytes(chunk.length), chunk.mtime_ns / 1e9)
                for chunk in found
            ]
        )

    def inventory(self) -> Inventory:
        """Key and bytes on disk of all chunks, least recently used first.

        Also removes the temporaries of dead writers and corrects the ledger, so
        this is all that a restart needs. Gives the root's lock back now and then: what others
        remove meanwhile is told by `take_removed`.
        """
        return self._scanned(
            lambda found: Inventory((chunk.key, disk_bytes(chunk.length)) for chunk in found)
        )

    def _scanned(self, take: Callable[[Iterator[ChunkFile]], T]) -> T:
        """take: makes of the chunks what is returned, before the collector may look at it."""
        with self._counted("scan"), without_collector(), short_turns():
            with self._removals_lock:
                self._removals.skip()
            files = FileList(self._fs, self._directory, self.namespace)
            try:
                found = self._space.count(self._name, files.of)
            finally:
                files.close()
            if files.damage:
                self._note_repair(f"{self._directory}/{LIST_FILE}: {files.damage}")
            self._number = len(found)
            return take(in_order(found, last_use))

    def keep_list(self, until: float) -> bool:
        """Write down what is known of the files, so that the next `scan` need not ask for each.

        Not for fewer than `LISTED_FROM` chunks, or if nothing has changed, and given up at
        `until`, on the monotonic clock. True if it was written. Takes no lock of the root.
        """
        if not self._changed or self._number < LISTED_FROM:
            return False
        with self._counted("list"), short_turns():
            self._changed = False
            number = file_list.write(self._fs, self._directory, self.namespace, until)
            if number is None:
                self._changed = True
                return False
            self._number = number
        return True

    def used(self) -> int:
        """Bytes of the whole root by the ledger: never below what is on disk."""
        with self._counted("used"):
            return self._space.used()

    def take_evicted(self) -> list[RecordKey]:
        """Keys of this namespace that this store evicted since the last call."""
        with self._lock:
            evicted, self._evicted = self._evicted, []
        return evicted

    def take_removed(self) -> list[RecordKey]:
        """Keys of this namespace that anybody removed since the last call, or since `scan`.

        Of these, those that are gone now. Takes no lock of the root.
        """
        with self._counted("removals"), self._removals_lock:
            told = dict.fromkeys(self._removals.take())
            return [key for key in told if self._fs.stat(chunk_path(self._directory, key)) is None]

    def counts(self) -> dict[str, int]:
        """Totals since opening: writes, writes_present, written_bytes (of files), reads,
        read_bytes, removed, evicted, evicted_bytes (of files, of all namespaces), repairs (files
        made anew)."""
        with self._lock:
            return dict(self._counts)

    def errors(self) -> dict[tuple[str, str], int]:
        """Failures since opening by operation (write, refer, read, remove, drop, touch,
        scan, list, used, removals, cleanup) and reason."""
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
        damage = record.layout_damage(self._fs, self.root)
        try:
            self._fs.mkdir(f"{self._directory}/{TEMPORARY_DIRECTORY}")
        except DiskError as error:
            if error.reason != "foreign":
                raise
            with self._space.locked():
                for path in (self._directory, f"{self._directory}/{TEMPORARY_DIRECTORY}"):
                    make_directory(self._fs, self.root, path)
        self._mark.set()  # before the record, by which alone it could be taken for ended
        if damage is None and self._record is None:
            return
        with self._space.locked():
            damage = record.layout_damage(self._fs, self.root)
            if damage is not None:
                record.write_layout(self._fs, self.root, self._directory)
            if damage:
                self._note_repair(f"{self.root}/{LAYOUT_FILE}: {damage}")
            if self._record is not None and record.write_record(
                self._fs, self.root, self._directory, self._record
            ):
                self._note_repair(f"{self._directory}/{RECORD_FILE}: it could not be read")

    def _bound_of(self, namespace: str) -> int:
        """Most bytes of a chunk, by the namespace's record if it is another's."""
        if namespace not in self._bounds:
            found = record.read_record(self._fs, f"{self.root}/{namespace}")
            stated = found.most_bytes if found is not None else 0
            self._bounds[namespace] = min(self.capacity, stated or self.capacity)
        return self._bounds[namespace]

    def _remove_quietly(self, key: RecordKey) -> None:
        with suppress(DiskError), self._counted("cleanup"):
            self._space.remove(self._name, [key])

    def _note_eviction(self, chunk: ChunkFile, _: int) -> None:
        with self._lock:
            self._counts["evicted"] += 1
            self._counts["evicted_bytes"] += chunk.length
            if chunk.namespace == self._name:
                self._evicted.append(chunk.key)

    def _note_repair(self, problem: str) -> None:
        logger.warning("kvtc: damaged file of the disk tier was removed or made anew: %s", problem)
        self._count("repairs")

    @contextmanager
    def _counted(self, operation: str) -> Iterator[None]:
        try:
            if self._closed:
                raise DiskError("closed", "the store was closed")
            yield
        except DiskError as error:
            self._note_error(operation, error)
            raise

    def _note_error(self, operation: str, error: DiskError) -> None:
        with self._lock:
            self._errors[operation, error.reason] += 1

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number
