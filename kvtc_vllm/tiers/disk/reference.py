"""Chunks whose body another chunk has: a small file, and a link to the other's file.

A blob begins with a head and ends with a tail of its own, header and checksum; what lies between
is its body. The second chunk of a tenant with a body is a *reference*: a file with its own head and
tail that names the first, its *representative*, which is an ordinary file. Beside it, in the
representative's fan-out directory, is a hard link to the representative's file::

    <first byte of K2>/<K2>.kvtc        the reference, of `REFERENCE_BYTES`
    <first byte of K1>/<K1>.<K2>.body   a link to <K1>.kvtc, through which K2 is read

So a representative that is evicted loses its name, is not offered any more, and stays until the
last reference to it goes: the file system counts the references. Its bytes are then charged once,
to the directory that they were charged to before, however many links there are. A link without its
reference, which a killed process leaves, takes nothing while the representative has its name, and
goes with the next count after that.

File of a reference, little-endian::

    0    8 bytes   "KVTCSAME"
    8    uint16    1, the version
    10   uint16    bytes of the representative's key
    12   uint32    bytes of the blob
    16   76 bytes  the blob's head
    92   16 bytes  the blob's tail
    108  100 bytes the representative's key, padded with zeros
    208  16 bytes  XXH3-128 of all before
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

import xxhash

from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.layout import (
    CHECKSUM_BYTES,
    IDENTITY_BYTES,
    IDENTITY_OFFSET,
    LINK_SUFFIX,
    MAX_KEY_BYTES,
    chunk_path,
    disk_bytes,
    fan_out_path,
)
from kvtc_vllm.tiers.keys import RecordKey

HEAD_BYTES = IDENTITY_OFFSET + IDENTITY_BYTES
TAIL_BYTES = CHECKSUM_BYTES

_MAGIC = b"KVTCSAME"
_VERSION = 1
_CONTENT = struct.Struct(f"<8sHHI{HEAD_BYTES}s{TAIL_BYTES}s{MAX_KEY_BYTES}s")
REFERENCE_BYTES = _CONTENT.size + CHECKSUM_BYTES
"""Of a file with a reference. A blob may have as many; it begins otherwise."""
_MOST_NAME_BYTES = 255


class Reference(NamedTuple):
    """What a reference says. of: its representative. length: bytes of the blob."""

    of: RecordKey
    length: int
    head: bytes
    tail: bytes


def body_of(blob: bytes) -> bytes:
    """What chunks may share of a blob."""
    return blob[HEAD_BYTES:-TAIL_BYTES]


def can_refer(key: RecordKey, of: RecordKey) -> bool:
    """Whether a file name can hold both keys."""
    return 2 * (len(key) + len(of)) + 1 + len(LINK_SUFFIX) <= _MOST_NAME_BYTES


def encode(of: RecordKey, blob: bytes) -> bytes:
    """The file of a blob whose body `of` has."""
    head, tail = blob[:HEAD_BYTES], blob[-TAIL_BYTES:]
    content = _CONTENT.pack(_MAGIC, _VERSION, len(of), len(blob), head, tail, of)
    return content + xxhash.xxh3_128_digest(content)


def decode(content: bytes) -> Reference | None:
    """What a file says; None if it is no reference. Raises DiskError "corrupt"."""
    if len(content) != REFERENCE_BYTES or not content.startswith(_MAGIC):
        return None
    if xxhash.xxh3_128_digest(content[:-CHECKSUM_BYTES]) != content[-CHECKSUM_BYTES:]:
        raise DiskError("corrupt", "the reference was altered after writing")
    _, version, used, length, head, tail, key = _CONTENT.unpack_from(content)
    if version != _VERSION or not 1 <= used <= MAX_KEY_BYTES:
        raise DiskError("corrupt", f"a reference of version {version}, {_VERSION} expected")
    return Reference(RecordKey(key[:used]), length, head, tail)


def joined(reference: Reference, representative: bytes) -> bytes:
    """The blob, unverified."""
    return b"".join((reference.head, body_of(representative), reference.tail))


def link_path(directory: str, of: RecordKey, key: RecordKey) -> str:
    """Path of the link through which `key` reads its representative `of`."""
    return f"{fan_out_path(directory, of[0])}/{of.hex()}.{key.hex()}{LINK_SUFFIX}"


def link_keys(name: str) -> tuple[RecordKey, RecordKey] | None:
    """Representative and reference of a link's file name, None for any other name."""
    of, dot, key = name.removesuffix(LINK_SUFFIX).partition(".")
    if not dot or not name.endswith(LINK_SUFFIX):
        return None
    try:
        keys = RecordKey(bytes.fromhex(of)), RecordKey(bytes.fromhex(key))
    except ValueError:
        return None
    # fromhex takes spaces and capitals too
    return keys if all(keys) and (keys[0].hex(), keys[1].hex()) == (of, key) else None


def has_references(fs: CheckedFileSystem, directory: str, of: RecordKey, inode: int) -> bool:
    """Whether a link to this file of a chunk is in its directory. Raises DiskError."""
    start = f"{of.hex()}."
    return any(
        found == inode and name.startswith(start) and name.endswith(LINK_SUFFIX)
        for name, found in fs.names(fan_out_path(directory, of[0]))
    )


def is_read(fs: CheckedFileSystem, directory: str, key: RecordKey) -> bool:
    """Whether a chunk is there that may be read through a link. Raises DiskError."""
    there = fs.stat(chunk_path(directory, key)) if len(key) <= MAX_KEY_BYTES else None
    return there is not None and there.size == REFERENCE_BYTES


def kept_bytes(
    fs: CheckedFileSystem,
    directory: str,
    number: int,
    names: Iterable[tuple[str, int]],
    most_bytes: int,
    remove: Callable[[str], object] | None = None,
) -> int:
    """Bytes of representatives in a fan-out directory that have only links left.

    names: of its files, with their inodes. most_bytes: of a chunk; a larger file is none. remove:
    called with the path of links of theirs that no chunk is read through, all of them if no other
    is left. Raises DiskError.
    """
    # By what the directory says: nothing is asked for a link whose representative is there, and no
    # more of a representative than one link that is read.
    inodes = dict(names)
    kept: dict[int, int] = {}
    for name, inode in inodes.items():
        keys = link_keys(name)
        if keys is None or keys[0][0] != number or len(keys[0]) > MAX_KEY_BYTES:
            continue
        of, key = keys
        own = chunk_path(directory, of).rpartition("/")[2]
        if inodes.get(own) == inode or inode in kept:
            continue
        path = link_path(directory, of, key)
        there = fs.stat(path)
        if there is None or not there.is_regular:
            continue
        useless = there.size > most_bytes or not is_read(fs, directory, key)
        if useless and remove is not None:
            with suppress(DiskError):
                remove(path)
                continue
        kept[inode] = disk_bytes(min(there.size, most_bytes))
    return sum(kept.values())
