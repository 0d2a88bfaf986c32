"""Reading a chunk's file, and what it refers to."""

from __future__ import annotations

import os

from kvtc_vllm.tiers.disk import reference
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.filesystem import FileInfo
from kvtc_vllm.tiers.disk.layout import MIN_BLOB_BYTES, check_blob, chunk_path
from kvtc_vllm.tiers.keys import RecordKey

LOST = frozenset({"missing", "corrupt", "foreign"})
"""Reasons for which a representative can't be read and never will be."""
_TRIES = 3


def read_blob(fs: CheckedFileSystem, directory: str, key: RecordKey, most_bytes: int) -> bytes:
    """The blob of a chunk in a namespace's directory; unverified, if it is in one file.

    Takes no lock. most_bytes: of a blob; a larger file is not read. Raises DiskError, "missing" if
    there is none, "representative" if it is a reference and what it refers to is not what it was.
    """
    path = chunk_path(directory, key)
    for _ in range(_TRIES):
        content, file = read_file(fs, path, most_bytes)
        found = reference.decode(content)
        if found is None:
            return content
        link = reference.link_path(directory, found.of, key)
        try:
            representative, _ = read_file(fs, link, most_bytes)
            if len(representative) != found.length:
                raise DiskError("corrupt", f"{len(representative)} bytes, {found.length} expected")
            blob = reference.joined(found, representative)
            check_blob(blob, bytes.fromhex(directory.rpartition("/")[2]), key)
            return blob
        except DiskError as error:
            if error.reason not in LOST:
                raise
            there = fs.stat(path)
            if there is None or (there.inode, there.mtime_ns) != (file.inode, file.mtime_ns):
                continue  # removed meanwhile, perhaps written anew
            raise DiskError("representative", f"what {path} refers to: {error}") from error
    raise DiskError("missing", f"{path} is removed and written again and again")


def read_file(fs: CheckedFileSystem, path: str, most_bytes: int) -> tuple[bytes, FileInfo]:
    """A file. Raises DiskError, "corrupt" unread for an impossible size."""
    fd = fs.open(path, os.O_RDONLY)
    try:
        there = fs.fstat(fd)
        if not MIN_BLOB_BYTES <= there.size <= most_bytes:
            raise DiskError("corrupt", f"{there.size} bytes cannot be a blob")
        return fs.read_all(fd, there.size), there
    finally:
        fs.close_quietly(fd)
