"""What references change in a root: links to representatives and their bytes in the ledger."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from kvtc_vllm.tiers.disk import reference
from kvtc_vllm.tiers.disk.bodies import Representative
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.filesystem import FileInfo
from kvtc_vllm.tiers.disk.layout import chunk_path, disk_bytes, fan_out_of
from kvtc_vllm.tiers.disk.ledger import LedgerState
from kvtc_vllm.tiers.disk.reading import read_file
from kvtc_vllm.tiers.disk.reference import REFERENCE_BYTES, Reference
from kvtc_vllm.tiers.keys import RecordKey


class References:
    """The references of one root. Every method is called under the root's lock.

    most_bytes: of a chunk, by the namespace's directory name.
    """

    def __init__(self, fs: CheckedFileSystem, root: str, most_bytes: Callable[[str], int]) -> None:
        self._fs = fs
        self._root = root
        self._most_bytes = most_bytes

    def of(self, namespace: str, key: RecordKey, there: FileInfo) -> RecordKey | None:
        """What the file in a chunk's place refers to, if it is a sound reference."""
        found = self._read(namespace, key, there)
        return None if found is None else found.of

    def blob_length(self, namespace: str, key: RecordKey, there: FileInfo) -> int | None:
        """Bytes of the blob that the file in a chunk's place stands for, if it is a reference."""
        found = self._read(namespace, key, there)
        return None if found is None else found.length

    def link(self, ledger: LedgerState, namespace: str, key: RecordKey, of: Representative) -> None:
        """Let `key` be read through what it refers to. Raises DiskError if that was replaced."""
        directory = self._directory(namespace)
        source = chunk_path(directory, of.key)
        target = reference.link_path(directory, of.key, key)
        try:
            self._fs.link(source, target)
        except DiskError as error:
            if error.reason != "foreign":
                raise
            self.unlink(ledger, namespace, key, of.key)  # of a process that was killed
            self._fs.link(source, target)
        there = self._fs.stat(target)
        if there is None or there.inode != of.inode:
            self.unlink(ledger, namespace, key, of.key)
            raise DiskError("representative", f"{source} is not what was compared")

    def unlink(self, ledger: LedgerState, namespace: str, key: RecordKey, of: RecordKey) -> int:
        """Undo `link`; returns the bytes freed. What can't be removed goes with a count."""
        path = reference.link_path(self._directory(namespace), of, key)
        with suppress(DiskError):
            there = self._fs.stat(path)
            # Another name: that of the chunk, or of another link. Somebody's copy outside of the
            # tier as well; a count finds that nothing of ours is left.
            if there is None or not self._fs.unlink(path):
                return 0
            if there.is_regular and there.links == 1:
                size = disk_bytes(min(there.size, self._most_bytes(namespace)))
                ledger.account(namespace).removed(fan_out_of(of), size)
                return size
        return 0

    def keep(self, namespace: str, key: RecordKey, there: FileInfo) -> bool:
        """Whether others refer to a chunk's file, so that it stays when its name goes."""
        if not there.is_regular or there.links == 1:
            return False
        try:
            return reference.has_references(self._fs, self._directory(namespace), key, there.inode)
        except DiskError:
            return True  # too high is safe, and a count corrects it

    def _directory(self, namespace: str) -> str:
        return f"{self._root}/{namespace}"

    def _read(self, namespace: str, key: RecordKey, there: FileInfo) -> Reference | None:
        if not there.is_regular or there.size != REFERENCE_BYTES:
            return None
        with suppress(DiskError):  # what can't be read leaves a link, which a count removes
            path = chunk_path(self._directory(namespace), key)
            return reference.decode(read_file(self._fs, path, REFERENCE_BYTES)[0])
        return None
