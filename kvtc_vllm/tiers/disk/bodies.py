"""Which chunks of a namespace have which body: as far as this process has written them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

from kvtc_vllm.tiers.disk import reference
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.layout import BLOCK_BYTES, check_blob, chunk_path
from kvtc_vllm.tiers.disk.reading import LOST, read_file
from kvtc_vllm.tiers.disk.recency import Recency
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.once_store import body_name

MOST_BODIES = 65_536
"""Remembered, the newest: some 15 MiB."""


class Representative(NamedTuple):
    """A chunk on disk with the body that another one is to refer to. inode: of its file."""

    key: RecordKey
    inode: int


class Bodies:
    """Finds a chunk of the same tenant with the same body. Thread-safe."""

    def __init__(
        self, fs: CheckedFileSystem, recency: Recency, directory: str, namespace: bytes
    ) -> None:
        self._fs = fs
        self._recency = recency
        self._directory = directory
        self._namespace = namespace
        self._chunks: OrderedDict[bytes, RecordKey] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, key: RecordKey, blob: bytes, tenant: bytes) -> None:
        """Remember a chunk that was written whole. Nobody's are not."""
        if not tenant:
            return
        with self._lock:
            self._chunks[body_name(tenant, reference.body_of(blob))] = key
            if len(self._chunks) > MOST_BODIES:
                self._chunks.popitem(last=False)

    def find(self, key: RecordKey, blob: bytes, tenant: bytes) -> Representative | None:
        """What `key` may refer to: read, compared byte by byte, and marked as used.

        None if there is nothing, or nothing to be saved. Uses the disk only where a chunk with
        this body was written. Raises DiskError if that can't be read for now.
        """
        if not tenant or len(blob) <= BLOCK_BYTES:
            return None
        body = reference.body_of(blob)
        with self._lock:
            of = self._chunks.get(body_name(tenant, body))
        if of is None or of == key or not reference.can_refer(key, of):
            return None
        path = chunk_path(self._directory, of)
        try:
            found, file = read_file(self._fs, path, len(blob))
            check_blob(found, self._namespace, of)
            if reference.body_of(found) != body:
                return None
            self._recency.touch(path)  # or the room that is made next could be its own
        except DiskError as error:
            if error.reason not in LOST:
                raise
            return None  # gone, or a reference by now; who reads it finds out what is wrong
        return Representative(of, file.inode)
