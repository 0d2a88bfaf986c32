"""Blobs with their records, stored and loaded by blocking calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObj, MemoryObjMetadata, TensorMemoryObj

from kvtc_vllm.lmcache.inner import Batch, BlockingL2
from kvtc_vllm.lmcache.records import RECORD_BYTES, blob_key, pack_record, unpack_record
from kvtc_vllm.lmcache.transcoder import Refused, Transcoder

T = TypeVar("T")

LOAD_ATTEMPTS = 2
"""A record, or a blob that its record promises, that can't be loaded then is deleted."""


@dataclass
class _Load:
    """One blob on its way from the storage to LMCache."""

    record: ObjectKey
    key: ObjectKey
    """LMCache's own, under which the blob verifies."""
    buffer: MemoryObj
    length: int | None
    """As recorded: None without a record, 0 if the record is damaged."""
    read: bool = False
    good: bool = False


class SizedIO:
    """Several threads may call at once; every call blocks and may raise Abandoned.

    delete, unlock: the storage's own; deletion blocks. Records are named as the storage names them
    (`kvtc_vllm.lmcache.records`).
    """

    def __init__(
        self,
        storage: BlockingL2,
        delete: Callable[[list[ObjectKey]], None],
        unlock: Callable[[list[ObjectKey]], None],
        transcoder: Transcoder,
    ) -> None:
        self._storage = storage
        self._delete = delete
        self._unlock = unlock
        self._transcoder = transcoder

    def store(self, records: Sequence[ObjectKey], blobs: Sequence[MemoryObj]) -> int | None:
        """Store blobs, then their records, where there is no record yet.

        Returns the bytes written, None if any blob failed.
        """
        there = self._there(records)
        wanted = [
            (record, blob)
            for record, blob, has in zip(records, blobs, there, strict=True)
            if not has
        ]
        groups = _by_size(wanted, lambda pair: pair[1])
        results = self._storage.store([_named_by_length(group) for group in groups])
        stored = [pair for group, ok in zip(groups, results, strict=True) if ok for pair in group]
        if stored:
            sizes = [record_object(blob.get_size()) for _, blob in stored]
            if not all(self._storage.store([([record for record, _ in stored], sizes)])):
                return None
        if not all(results):
            return None
        return sum(blob.get_size() + RECORD_BYTES for _, blob in stored)

    def load(
        self, records: Sequence[ObjectKey], wanted: Sequence[tuple[ObjectKey, MemoryObj]]
    ) -> list[bool]:
        """Load and verify blobs; every buffer of a True result is narrowed to its blob.

        wanted: LMCache's own key, under which the blob verifies, and the buffer, of each record.
        """
        loads = [
            _Load(record, key, buffer, length)
            for record, (key, buffer), length in zip(
                records, wanted, self._lengths(records), strict=True
            )
        ]
        if gone := [load.record for load in loads if load.length is None]:
            # LMCache asked because a lookup found them. S3's client remembers what there was,
            # whoever deleted it since, and would take it for stored until it is told.
            self._delete(gone)
        recorded = [load for load in loads if load.length is not None]
        fitting = [load for load in recorded if self._narrowed(load)]
        self._read(fitting)
        for load in fitting:
            load.good = self._verified(load)
        self._delete_all([(load.record, load.length or 0) for load in recorded if not load.good])
        return [load.good for load in loads]

    def delete_by_record(self, records: Sequence[ObjectKey]) -> None:
        """Delete records and the blobs that they promise."""
        there = self._there(records)
        found = [record for record, has in zip(records, there, strict=True) if has]
        lengths = self._lengths(found)
        self._delete_all([(r, n or 0) for r, n in zip(found, lengths, strict=True)])

    def _delete_all(self, entries: Sequence[tuple[ObjectKey, int]]) -> None:
        if entries:
            self._delete([record for record, _ in entries])
            self._delete([blob_key(record, length) for record, length in entries])

    def _there(self, keys: Sequence[ObjectKey]) -> list[bool]:
        """Which objects there are; nothing stays locked."""
        if not keys:
            return []
        found = self._storage.lookup_and_lock(list(keys))
        self._unlock([key for key, has in zip(keys, found, strict=True) if has])
        return found

    def _lengths(self, records: Sequence[ObjectKey]) -> list[int | None]:
        """Length of each blob, None without a record. A damaged record is given as 0."""
        if not records:
            return []
        objects = [record_object(0) for _ in records]
        loaded = [False] * len(records)
        for _ in range(LOAD_ATTEMPTS):
            left = [i for i, has in enumerate(loaded) if not has]
            if left:
                batch = [records[i] for i in left], [objects[i] for i in left]
                for i, has in zip(left, self._storage.load([batch])[0], strict=True):
                    loaded[i] = has
        return [
            (unpack_record(bytes(obj.byte_array)) or 0) if has else None
            for obj, has in zip(objects, loaded, strict=True)
        ]

    def _narrowed(self, load: _Load) -> bool:
        """Narrow the buffer to the recorded length. False if the blob can't be that long."""
        length, capacity = load.length or 0, load.buffer.get_size()
        if 0 < length <= capacity:
            load.buffer.set_used_size(length)
            return True
        self._count("size", f"a blob of {length} bytes for a buffer of {capacity}")
        return False

    def _read(self, loads: Sequence[_Load]) -> None:
        """Read into narrowed buffers, and mark the loads of those that were filled."""
        there = self._there([blob_key(load.record, load.length or 0) for load in loads])
        pending = [load for load, has in zip(loads, there, strict=True) if has]
        for _ in range(LOAD_ATTEMPTS):
            groups = _by_size(pending, lambda load: load.buffer)
            batches = [_named_by_length((x.record, x.buffer) for x in group) for group in groups]
            for group, results in zip(groups, self._storage.load(batches), strict=True):
                for load, done in zip(group, results, strict=True):
                    load.read = done
            pending = [load for load in pending if not load.read]

    def _verified(self, load: _Load) -> bool:
        if not load.read:
            self._count("missing", "a blob that has a record can't be loaded")
            return False
        try:
            self._transcoder.verify(memoryview(load.buffer.byte_array).cast("B"), load.key)
        except Refused as error:
            self._count(error.reason, str(error))
            return False
        return True

    def _count(self, reason: str, message: str) -> None:
        self._transcoder.counters.warn(f"failed_loads/{reason}", message)


def record_object(length: int) -> MemoryObj:
    """A buffer of LMCache's type that holds the record of a blob."""
    data = torch.frombuffer(bytearray(pack_record(length)), dtype=torch.uint8)
    shape = torch.Size([RECORD_BYTES])
    metadata = MemoryObjMetadata(
        shape=shape,
        dtype=torch.uint8,
        address=0,
        phy_size=RECORD_BYTES,
        ref_count=1,
        fmt=MemoryFormat.BINARY,
        shapes=[shape],
        dtypes=[torch.uint8],
    )
    return TensorMemoryObj(data, metadata, parent_allocator=None)


def _by_size(items: Iterable[T], buffer: Callable[[T], MemoryObj]) -> list[list[T]]:
    """One group per size: LMCache's Redis client takes buffers of one size in a batch."""
    groups: dict[int, list[T]] = defaultdict(list)
    for item in items:
        groups[buffer(item).get_size()].append(item)
    return list(groups.values())


def _named_by_length(pairs: Iterable[tuple[ObjectKey, MemoryObj]]) -> Batch:
    """A batch of blobs under their own names."""
    named = [(blob_key(record, blob.get_size()), blob) for record, blob in pairs]
    return [key for key, _ in named], [blob for _, blob in named]
