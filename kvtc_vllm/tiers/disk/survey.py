"""A tier's root as an operator sees it: every namespace, whoever wrote it.

Used by `kvtc inspect`, `kvtc verify` and `kvtc gc`; safe while engines use the root, to which
a chunk removed here is a miss.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtc_vllm.tiers.disk import record, scan
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.drop import drop_namespace
from kvtc_vllm.tiers.disk.filesystem import OsFileSystem
from kvtc_vllm.tiers.disk.in_use import is_in_use
from kvtc_vllm.tiers.disk.layout import chunk_path, disk_bytes, fan_out_path
from kvtc_vllm.tiers.disk.reading import read_blob
from kvtc_vllm.tiers.disk.recency import Recency
from kvtc_vllm.tiers.disk.reference import is_read, kept_bytes, link_keys
from kvtc_vllm.tiers.disk.scan import ChunkFile, last_use
from kvtc_vllm.tiers.disk.sorting import in_order
from kvtc_vllm.tiers.disk.space import Space
from kvtc_vllm.tiers.keys import RecordKey

logger = logging.getLogger("vllm.kvtc")

MAX_BLOB_BYTES = 2**32
"""Of a chunk whose namespace does not say; lengths in FORMAT.md are of 32 bits."""

_UNBOUNDED = 2**63


@dataclass(frozen=True)
class NamespaceSummary:
    """One namespace."""

    name: str
    """Of its directory: the fingerprint in hex."""
    record: record.NamespaceRecord | None
    """None if absent or unreadable."""
    chunks: int
    """Number of chunks."""
    stored: int
    """Bytes of their files."""
    used: int
    """Bytes that they take on disk, with representatives that others refer to."""
    references: int
    """Number of chunks whose body another chunk has."""
    oldest: float
    """Last use of the chunk used longest ago, seconds since the epoch; 0 without chunks."""
    newest: float
    """Last use of the chunk used most recently, seconds since the epoch; 0 without chunks."""
    hits: int
    """Verified reads so far."""
    temporaries: int
    """Number of files still being written, dead writers' included."""
    in_use: bool
    """Whether a living process has it open."""


class Survey:
    """Looks at and cleans the tier in `root`. Raises DiskError, "layout" if it is none."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(Path(root))
        self._fs = CheckedFileSystem(OsFileSystem(self.root))
        self._bounds: dict[str, int] = {}
        if record.layout_damage(self._fs, self.root) == "":
            raise DiskError("layout", f"{self.root} is not a disk tier: it has no layout.json")

    def namespaces(self) -> list[str]:
        """Names of their directories: the fingerprint in hex."""
        return scan.namespaces(self._fs, self.root)

    def chunks(self, namespace: str) -> list[ChunkFile]:
        """The chunks of a namespace, least recently used first."""
        return list(in_order(list(scan.chunks(self._fs, self._directory(namespace))), last_use))

    def path(self, namespace: str, key: RecordKey) -> str:
        """Path of a chunk's file, whether it exists or not."""
        return chunk_path(self._directory(namespace), key)

    def read(self, namespace: str, key: RecordKey) -> bytes:
        """A chunk's blob. Raises DiskError, "corrupt" without reading if its file is too large,
        "representative" if it refers to what is gone or damaged."""
        directory = self._directory(namespace)
        return read_blob(self._fs, directory, key, self._most_bytes(namespace))

    def summaries(self) -> Iterator[NamespaceSummary]:
        """All namespaces. Changes nothing but the ledger, if it was lost."""
        return self._summaries(self.namespaces())

    def ended(self) -> Iterator[NamespaceSummary]:
        """The namespaces that nobody can name any more: generations that are not in use."""
        return self._summaries(name for name in self.namespaces() if self._has_ended(name))

    def in_use(self, namespace: str) -> bool:
        """True while a living process has the namespace open, and if that cannot be told."""
        return is_in_use(self._fs, self._directory(namespace))

    def remove(self, namespace: str, keys: Sequence[RecordKey]) -> int:
        """Remove chunks; returns how many there were."""
        space = self._space(_UNBOUNDED)
        try:
            return space.remove(namespace, keys)
        finally:
            space.close()

    def drop(self, namespace: str) -> int:
        """Remove a namespace, also one in use; returns how many chunks it had.

        Its directories go too, unless a living writer or a file that is not ours is in them.
        """
        space = self._space(_UNBOUNDED)
        try:
            return drop_namespace(self._fs, space, self.root, namespace)
        finally:
            space.close()

    def clean(self) -> None:
        """Remove the temporaries of dead writers and correct the ledger."""
        space = self._space(_UNBOUNDED)
        try:
            space.count_all()
        finally:
            space.close()

    def shrink(self, capacity: int) -> tuple[int, int, int]:
        """Evict the least recently used until `capacity` bytes.

        Returns chunks evicted, bytes freed, and the bytes above it that are left.
        """
        evicted: list[int] = []
        space = self._space(capacity, evicted)
        try:
            left = space.shrink()
        finally:
            space.close()
        return len(evicted), sum(evicted), left

    def _has_ended(self, namespace: str) -> bool:
        found = self._record(namespace)
        return found is not None and found.generation != "" and not self.in_use(namespace)

    def _summaries(self, names: Iterable[str]) -> Iterator[NamespaceSummary]:
        space = self._space(_UNBOUNDED)
        try:
            with space.locked() as ledger:
                hits = {name: account.hits for name, account in ledger.accounts.items()}
        finally:
            space.close()
        for name in names:
            found = self.chunks(name)
            references, kept = self._references(name)
            yield NamespaceSummary(
                name=name,
                record=self._record(name),
                chunks=len(found),
                stored=sum(chunk.length for chunk in found),
                used=sum(disk_bytes(chunk.length) for chunk in found) + kept,
                references=references,
                oldest=found[0].mtime_ns / 1e9 if found else 0.0,
                newest=found[-1].mtime_ns / 1e9 if found else 0.0,
                hits=hits.get(name, 0),
                temporaries=len(scan.temporaries(self._fs, self._directory(name))),
                in_use=self.in_use(name),
            )

    def _references(self, namespace: str) -> tuple[int, int]:
        """How many there are, and bytes of representatives that have lost their own names."""
        directory = self._directory(namespace)
        number = kept = 0
        for place in sorted(scan.fan_outs(self._fs, directory)):
            names = list(self._fs.names(fan_out_path(directory, place)))
            users = [keys[1] for name, _ in names if (keys := link_keys(name)) is not None]
            number += sum(is_read(self._fs, directory, key) for key in users)
            if users:
                most = self._most_bytes(namespace)
                kept += kept_bytes(self._fs, directory, place, names, most)
        return number, kept

    def _record(self, namespace: str) -> record.NamespaceRecord | None:
        return record.read_record(self._fs, self._directory(namespace))

    def _directory(self, namespace: str) -> str:
        return f"{self.root}/{namespace}"

    def _space(self, capacity: int, evicted: list[int] | None = None) -> Space:
        def note(chunk: ChunkFile, freed: int) -> None:
            if evicted is not None:
                evicted.append(freed)

        return Space(
            self._fs,
            self.root,
            capacity,
            0,
            Recency(self._fs),
            most_bytes=self._most_bytes,
            evicted=note,
            repaired=lambda problem: logger.warning("kvtc: damaged: %s", problem),
        )

    def _most_bytes(self, namespace: str) -> int:
        if namespace not in self._bounds:
            found = self._record(namespace)
            self._bounds[namespace] = (found.most_bytes if found else 0) or MAX_BLOB_BYTES
        return self._bounds[namespace]
