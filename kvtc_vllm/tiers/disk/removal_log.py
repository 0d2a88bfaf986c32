"""Which chunks of a namespace were removed: told to all processes that have it open.

A file per namespace to which whoever removes a chunk appends its key, under the root's lock. Each
store reads on from where it stopped, without a lock. Full, the file becomes the old one and the
next is begun. Whoever has not looked for two whole files has missed something, and learns of that
from reads that fail.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.layout import MAX_KEY_BYTES, OLD_REMOVALS_FILE, REMOVALS_FILE
from kvtc_vllm.tiers.keys import RecordKey

MAX_LOG_BYTES = 2**20
"""Some 30,000 keys."""


def append(fs: CheckedFileSystem, directory: str, keys: Iterable[RecordKey]) -> None:
    """Tell of removed chunks of the namespace in `directory`. Call under the root's lock.

    Raises DiskError; what is not told is learnt from failing reads.
    """
    content = b"".join(bytes((len(key),)) + key for key in keys)
    path = f"{directory}/{REMOVALS_FILE}"
    there = fs.stat(path)
    if there is not None and (there.size > MAX_LOG_BYTES or there.links > 1):
        fs.rename(path, f"{directory}/{OLD_REMOVALS_FILE}")
    fd = fs.open(path, os.O_RDWR | os.O_CREAT)
    try:
        found = fs.fstat(fd)
        if found.links > 1:  # put there since
            raise DiskError("foreign", f"{path} is a file of another name too")
        fs.write_all(fd, content, found.size)
    finally:
        fs.close_quietly(fd)


class RemovalReader:
    """One store's place in the log of its namespace. For one thread at a time."""

    def __init__(self, fs: CheckedFileSystem, directory: str) -> None:
        self._fs = fs
        self._path = f"{directory}/{REMOVALS_FILE}"
        self._old_path = f"{directory}/{OLD_REMOVALS_FILE}"
        self._inode: int | None = None
        self._offset = 0

    def skip(self) -> None:
        """Go on from the end."""
        there = self._fs.stat(self._path)
        self._inode, self._offset = (there.inode, there.size) if there else (None, 0)

    def take(self) -> list[RecordKey]:
        """Keys told of since the last time. Raises DiskError."""
        there = self._fs.stat(self._path)
        if there is None or (there.inode == self._inode and there.size <= self._offset):
            return []
        keys: list[RecordKey] = []
        if there.inode != self._inode:
            if self._inode is not None:
                keys += self._read(self._old_path)
            self._inode, self._offset = there.inode, 0
        return keys + self._read(self._path)

    def _read(self, path: str) -> list[RecordKey]:
        """From the present place on, if the file is still that one; moves the place."""
        try:
            fd = self._fs.open(path, os.O_RDONLY)
        except DiskError as error:
            if error.reason == "missing":
                return []
            raise
        try:
            there = self._fs.fstat(fd)
            length = min(there.size - self._offset, 2 * MAX_LOG_BYTES)
            if there.inode != self._inode or length <= 0:
                return []
            keys, used = _split(self._fs.read_all(fd, length, self._offset))
            self._offset += used
            return keys
        finally:
            self._fs.close_quietly(fd)


def _split(content: bytes) -> tuple[list[RecordKey], int]:
    """Whole entries, and the bytes that they take; after a bad one nothing can be read."""
    keys: list[RecordKey] = []
    at = 0
    while at < len(content):
        length = content[at]
        if not 1 <= length <= MAX_KEY_BYTES:
            return keys, len(content)
        end = at + 1 + length
        if end > len(content):
            break  # just being written
        keys.append(RecordKey(content[at + 1 : end]))
        at = end
    return keys, at
