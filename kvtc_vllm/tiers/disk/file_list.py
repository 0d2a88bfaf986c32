"""What is known of a namespace's files, kept in one of them, so that a start need not ask again.

Size and time of last use are in a file's inode. A million inodes lie all over a volume: reading
them takes most of a minute where nothing is in the kernel's caches. The names lie together, in
the directories. So the directories say which files there are, and the list what each was when the
list was written. A file that the list does not name, or with another inode, is asked for.

The list is never needed: what cannot be read says nothing. Nor is it believed where it matters: a
chunk is verified when it is read. What changed in a file since can be wrong in two ways, the order
of last use, and the bytes counted for a file that somebody else has made longer or shorter.

File, little-endian::

    0      8 bytes   "KVTCLIST"
    8      uint16    1, the version; 6 bytes 0
    16     16 bytes  the namespace
    32     256 x 32  a fan-out directory each: uint64 offset of its section, uint32 bytes of it,
                     uint32 entries, uint8 width of a key, 7 bytes 0, uint64 XXH3-64 of it
    8224   16 bytes  XXH3-128 of all before; zeros up to 12288
    12288  sections  entries: uint8 bytes of the key, the key padded with zeros to the width,
                     uint64 inode, uint32 length in bytes, uint64 last use in ns since the epoch
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from contextlib import suppress

import xxhash

from kvtc_vllm.tiers.disk import scan
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.layout import FAN_OUTS, LIST_FILE, NEW_LIST_FILE, chunk_key, fan_out_path
from kvtc_vllm.tiers.disk.scan import KnownFile
from kvtc_vllm.tiers.keys import RecordKey

VERSION = 1
SECTIONS_AT = 12288
MOST_SECTION_BYTES = 2**26
"""Of a list that is read: a million files in one fan-out directory."""

_MAGIC = b"KVTCLIST"
_HEAD = struct.Struct("<8sH6x16s")
_SECTION = struct.Struct("<QIIB7xQ")
_CHECKSUM_AT = _HEAD.size + FAN_OUTS * _SECTION.size
_LARGEST = (2**64 - 1, 2**32 - 1, 2**64 - 1)


class FileList:
    """Reads the list of one namespace. Raises nothing; for one thread.

    damage: what is wrong with it; empty if it is sound or there is none.
    """

    def __init__(self, fs: CheckedFileSystem, directory: str, namespace: bytes) -> None:
        self._fs = fs
        self._path = f"{directory}/{LIST_FILE}"
        self._sections: list[tuple[int, int, int, int, int]] = []
        self._fd: int | None = None
        self.damage = ""
        try:
            self._fd = fs.open(self._path, os.O_RDONLY)
            head = fs.read_all(self._fd, SECTIONS_AT)
        except DiskError as error:
            self.damage = "" if error.reason == "missing" else str(error)
            return
        magic, version, owner = _HEAD.unpack_from(head)
        checksum = head[_CHECKSUM_AT : _CHECKSUM_AT + 16]
        if magic != _MAGIC or checksum != xxhash.xxh3_128_digest(head[:_CHECKSUM_AT]):
            self.damage = "it is no list, or altered"
        elif version != VERSION:
            self.damage = f"version {version}, {VERSION} expected"
        elif owner != namespace:
            self.damage = "it is another namespace's"
        else:
            self._sections = list(_SECTION.iter_unpack(head[_HEAD.size : _CHECKSUM_AT]))

    def of(self, number: int) -> Mapping[RecordKey, KnownFile]:
        """What is known of the files in one fan-out directory."""
        if not self._sections or self._fd is None:
            return {}
        offset, length, entries, width, checksum = self._sections[number]
        entry = _entry(width)
        if not entries:
            return {}
        if length != entries * entry.size or length > MOST_SECTION_BYTES:
            self.damage = f"a section of {length} bytes for {entries} entries"
            return {}
        try:
            section = self._fs.read_all(self._fd, length, offset)
        except DiskError as error:
            self.damage = str(error)
            return {}
        if xxhash.xxh3_64_intdigest(section) != checksum:
            self.damage = "a section was altered"
            return {}
        return {
            RecordKey(key[:used]): (inode, size, mtime_ns)
            for used, key, inode, size, mtime_ns in entry.iter_unpack(section)
        }

    def close(self) -> None:
        """Free the descriptor."""
        if self._fd is not None:
            self._fs.close_quietly(self._fd)
            self._fd = None


def write(fs: CheckedFileSystem, directory: str, namespace: bytes, until: float) -> int | None:
    """Write the list of the chunks in `directory`, in place of the one before.

    Returns how many chunks it names; None if it took until `until`, on the monotonic clock, or
    another process is writing it. Asks for every file, without the root's lock. Raises DiskError.
    """
    path = f"{directory}/{NEW_LIST_FILE}"
    fd = fs.open(path, os.O_RDWR | os.O_CREAT)
    try:
        if not fs.try_lock(fd):
            return None
        if fs.fstat(fd).links > 1:
            raise DiskError("foreign", f"{path} is a file of another name too")
        try:
            fs.truncate(fd, 0)
            number = _write_sections(fs, fd, directory, namespace, until)
            if number is not None:
                fs.rename(path, f"{directory}/{LIST_FILE}")
        except DiskError:
            _give_up(fs, fd, path)
            raise
        if number is None:
            _give_up(fs, fd, path)
        return number
    finally:
        fs.close_quietly(fd)


def _give_up(fs: CheckedFileSystem, fd: int, path: str) -> None:
    """Free the space, whatever fails."""
    with suppress(DiskError):
        fs.truncate(fd, 0)
    with suppress(DiskError):
        fs.unlink(path)


def _write_sections(
    fs: CheckedFileSystem, fd: int, directory: str, namespace: bytes, until: float
) -> int | None:
    there = scan.fan_outs(fs, directory)
    table = []
    total, offset = 0, SECTIONS_AT
    for number in range(FAN_OUTS):
        if time.monotonic() >= until:
            return None
        files = _look_at(fs, directory, number) if number in there else {}
        width = max(map(len, files), default=0)
        pack = _entry(width).pack
        section = b"".join(pack(len(key), key, *file) for key, file in files.items())
        fs.write_all(fd, section, offset)
        checksum = xxhash.xxh3_64_intdigest(section)
        table.append(_SECTION.pack(offset, len(section), len(files), width, checksum))
        total, offset = total + len(files), offset + len(section)
    head = _HEAD.pack(_MAGIC, VERSION, namespace) + b"".join(table)
    # Last: without it the file is no list.
    fs.write_all(fd, (head + xxhash.xxh3_128_digest(head)).ljust(SECTIONS_AT, b"\0"))
    return total


def _look_at(fs: CheckedFileSystem, directory: str, number: int) -> dict[RecordKey, KnownFile]:
    """The files of a fan-out directory.

    Inodes first: of a file that is replaced in between, the entry names the one that is gone.
    """
    inodes = dict(fs.names(fan_out_path(directory, number)))
    found: dict[RecordKey, KnownFile] = {}
    for name, _, size, mtime_ns in fs.list(fan_out_path(directory, number)):
        key = chunk_key(name)
        if key is None or name not in inodes:
            continue
        file = (inodes[name], size, mtime_ns)
        if all(0 <= value <= most for value, most in zip(file, _LARGEST, strict=True)):
            found[key] = file
    return found


def _entry(width: int) -> struct.Struct:
    return struct.Struct(f"<B{width}sQIQ")
