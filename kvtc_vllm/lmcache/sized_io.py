"""Blobs with their records, stored and loaded by blocking calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObj, MemoryObjMetadata, TensorMemoryObj

from kvtc_vllm.lmcache.blocking import Batch, BlockingL2
from kvtc_vllm.lmcache.records import RECORD_BYTES, blob_key, pack_record, unpack_record
from kvtc_vllm.lmcache.transcoder import Refused, Transcoder

LOAD_ATTEMPTS = 2
"""A record, or a blob that its record promises, that can't be loaded then is deleted."""


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
        groups = _by_size(wanted)
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
        lengths = self._lengths(records)
        if gone := [
            record for record, length in zip(records, lengths, strict=True) if length is None
        ]:
            # LMCache asked because a lookup found them. S3's client remembers what there was,
            # whoever deleted it since, and would take it for stored until it is told.
            self._delete(gone)
        fitting, bad = [], []
        for i, length in enumerate(lengths):
            if length is None:
                continue
            capacity = wanted[i][1].get_size()
            if 0 < length <= capacity:
                wanted[i][1].set_used_size(length)
                fitting.append(i)
            else:
                self._count("size", f"a blob of {length} bytes for a buffer of {capacity}")
                bad.append(i)
        there = self._there([blob_key(records[i], lengths[i] or 0) for i in fitting])
        pending = [i for i, has in zip(fitting, there, strict=True) if has]
        loaded: list[int] = []
        for _ in range(LOAD_ATTEMPTS):
            loaded += self._load_some([(i, records[i], wanted[i][1]) for i in pending])
            pending = sorted(set(pending) - set(loaded))
        for i in sorted(set(fitting) - set(loaded)):
            self._count("missing", "a blob that has a record can't be loaded")
            bad.append(i)
        good = [False] * len(records)
        for i in loaded:
            key, blob = wanted[i]
            try:
                self._transcoder.verify(memoryview(blob.byte_array).cast("B"), key)
                good[i] = True
            except Refused as error:
                self._count(error.reason, str(error))
                bad.append(i)
        self._delete_all([(records[i], lengths[i] or 0) for i in bad])
        return good

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

    def _there(self, keys: list[ObjectKey] | Sequence[ObjectKey]) -> list[bool]:
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

    def _load_some(self, wanted: Sequence[tuple[int, ObjectKey, MemoryObj]]) -> list[int]:
        """Indices of what was loaded."""
        index = {id(blob): i for i, _, blob in wanted}
        batches = [_named_by_length(group) for group in _by_size([(r, b) for _, r, b in wanted])]
        return [
            index[id(blob)]
            for (_, blobs), result in zip(batches, self._storage.load(batches), strict=True)
            for blob, ok in zip(blobs, result, strict=True)
            if ok
        ]

    def _count(self, reason: str, message: str) -> None:
        self._transcoder.counters.warn(f"failed_loads/{reason}", message)


def record_object(length: int) -> MemoryObj:
    """A buffer of LMCache's kind that holds the record of a blob."""
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


Pair = tuple[ObjectKey, MemoryObj]


def _by_size(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """One group a size: LMCache's Redis client takes buffers of one size in a batch."""
    by_size: dict[int, list[Pair]] = defaultdict(list)
    for record, blob in pairs:
        by_size[blob.get_size()].append((record, blob))
    return list(by_size.values())


def _named_by_length(pairs: Iterable[Pair]) -> Batch:
    """A batch of blobs under their own names."""
    named = [(blob_key(record, blob.get_size()), blob) for record, blob in pairs]
    return [key for key, _ in named], [blob for _, blob in named]
