"""Writing a chunk's file: the whole blob, or a reference to a chunk with the same body."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

from kvtc_vllm.tiers.disk import reference
from kvtc_vllm.tiers.disk.bodies import Bodies, Representative
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.layout import chunk_path, disk_bytes
from kvtc_vllm.tiers.disk.recency import Temporary
from kvtc_vllm.tiers.disk.space import Space
from kvtc_vllm.tiers.keys import RecordKey

logger = logging.getLogger("vllm.kvtc")


class ChunkWriter:
    """Writes the chunks of the namespace in `directory`. Thread-safe; raises only DiskError.

    prepare: makes the directory anew. not_shared: called where a chunk is written whole because a
    reference to another could not be.
    """

    def __init__(
        self,
        fs: CheckedFileSystem,
        space: Space,
        directory: str,
        bodies: Bodies,
        prepare: Callable[[], None],
        not_shared: Callable[[DiskError], None],
    ) -> None:
        self._fs = fs
        self._space = space
        self._directory = directory
        self._name = directory.rpartition("/")[2]
        self._bodies = bodies
        self._prepare = prepare
        self._not_shared = not_shared
        self._evicts_in_vain = False

    def write(self, key: RecordKey, blob: bytes, tenant: bytes) -> tuple[bool, int]:
        """Publish a sound blob; False if the key is there already. And the bytes of its file."""
        length = reference.REFERENCE_BYTES
        fresh = self._refer(key, blob, tenant)
        if fresh is None:
            length = len(blob)
            fresh = self._write_whole(key, blob)
            self._bodies.add(key, blob, tenant)
        if not fresh:
            with suppress(DiskError):
                there = self._fs.stat(chunk_path(self._directory, key))
                length = length if there is None else there.size
        return fresh, length

    def _refer(self, key: RecordKey, blob: bytes, tenant: bytes) -> bool | None:
        """None if there is nothing to refer to, or if that fails."""
        try:
            of = self._bodies.find(key, blob, tenant)
            if of is None:
                return None
            return self._write(key, reference.encode(of.key, blob), len(blob), of)
        except DiskError as error:
            logger.debug("kvtc: a chunk is written whole, it can't refer to another: %s", error)
            self._not_shared(error)
            return None

    def _write_whole(self, key: RecordKey, blob: bytes) -> bool:
        try:
            return self._write(key, blob, len(blob))
        except DiskError as error:
            if error.reason == "missing":
                self._prepare()  # somebody deleted the directory
            elif error.reason != "no_space" or not self._give_way(len(blob)):
                raise
        fresh = self._write(key, blob, len(blob))
        self._evicts_in_vain = False
        return fresh

    def _write(
        self, key: RecordKey, content: bytes, length: int, of: Representative | None = None
    ) -> bool:
        """length: bytes of the blob."""
        temporary = self._space.reserve(self._name, key, len(content), length)
        if temporary is None:
            return False
        try:
            self._fill(temporary, content)
            return self._space.publish(self._name, temporary, key, of)
        except BaseException:
            self._space.abandon(self._name, temporary)
            raise

    def _fill(self, temporary: Temporary, content: bytes) -> None:
        fd = temporary.open_fd
        self._fs.write_all(fd, content)
        if self._fs.read_all(fd, len(content)) != content:
            raise DiskError("io", "what was read back is not what was written")

    def _give_way(self, length: int) -> bool:
        """Evict for a write that the volume has no room for: no inodes, or a quota.

        Not again before a write after that succeeded: it may be of no use.
        """
        if self._evicts_in_vain:
            return False
        self._evicts_in_vain = True
        return self._space.give_way(disk_bytes(length))
