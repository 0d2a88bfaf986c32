"""Names and paths below a tier's root, what a file counts for, and whether its bytes are sound."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from typing import cast

import xxhash

from kvtc_vllm.tiers.disk.checked import DiskError
from kvtc_vllm.tiers.keys import RecordKey

LAYOUT_VERSION = 1
FAN_OUTS = 256
"""Directories over which the chunks of a namespace are spread, by the first byte of their keys."""
NAMESPACE_BYTES = 16
MAX_KEY_BYTES = 100
"""A file name holds two characters per byte and at most 255 in all."""
BLOCK_BYTES = 4096
LAYOUT_FILE = "layout.json"
LEDGER_FILE = "ledger.json"
RECORD_FILE = "namespace.json"
IN_USE_FILE = "in-use"
REMOVALS_FILE = "removals"
OLD_REMOVALS_FILE = "removals.old"
LIST_FILE = "files"
NEW_LIST_FILE = "files.new"
TEMPORARY_DIRECTORY = "tmp"

IDENTITY_OFFSET = 60
IDENTITY_BYTES = 16
CHECKSUM_BYTES = 16
MIN_BLOB_BYTES = IDENTITY_OFFSET + IDENTITY_BYTES + CHECKSUM_BYTES

CHUNK_SUFFIX = ".kvtc"
LINK_SUFFIX = ".body"
"""Of a link to a representative, see `reference`."""

_TEMPORARY_SUFFIX = ".tmp"
_KEY_DIGITS = range(2, 2 * MAX_KEY_BYTES + 1, 2)
_NAMESPACE = re.compile(r"[0-9a-f]{32}")
_FAN_OUT = re.compile(r"[0-9a-f]{2}")
_TEMPORARY = re.compile(r"[0-9]{1,10}-[0-9a-f]{16}\.tmp")


def disk_bytes(length: int) -> int:
    """Bytes that a file of `length` bytes takes: whole 4 KiB blocks."""
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES


def is_namespace(name: str) -> bool:
    """True for the directory name of a namespace."""
    return _NAMESPACE.fullmatch(name) is not None


def is_fan_out(name: str) -> bool:
    """True for the name of a directory that holds chunks."""
    return _FAN_OUT.fullmatch(name) is not None


def is_temporary(name: str) -> bool:
    """True for the name of a file that is still being written."""
    return _TEMPORARY.fullmatch(name) is not None


def fan_out_of(key: RecordKey) -> int:
    """Number of the directory that a chunk is in."""
    return key[0]


def fan_out_path(directory: str, number: int) -> str:
    """Path of a fan-out directory in a namespace's directory."""
    return f"{directory}/{number:02x}"


def chunk_path(directory: str, key: RecordKey) -> str:
    """Path of a chunk in a namespace's directory. Raises DiskError "key"."""
    if not 1 <= len(key) <= MAX_KEY_BYTES:
        raise DiskError("key", f"{len(key)} bytes, 1 to {MAX_KEY_BYTES} expected")
    name = key.hex()
    return f"{directory}/{name[:2]}/{name}{CHUNK_SUFFIX}"


def chunk_key(name: str) -> RecordKey | None:
    """The key of a chunk's file name, None for any other name."""
    stem = name.removesuffix(CHUNK_SUFFIX)
    if stem == name:
        return None
    try:
        key = bytes.fromhex(stem)
    except ValueError:
        return None
    if not 1 <= len(key) <= MAX_KEY_BYTES:
        return None  # a file of somebody else's
    return RecordKey(key) if key.hex() == stem else None  # fromhex takes spaces and capitals too


def keys_of_names(names: Sequence[str]) -> list[RecordKey | None]:
    """`chunk_key` of each, in a few operations for all if every name is a chunk's."""
    stems = [name.removesuffix(CHUNK_SUFFIX) for name in names]
    digits = [*map(len, stems)]
    whole = [*map(len, names)] == [number + len(CHUNK_SUFFIX) for number in digits]
    if whole and all(number in _KEY_DIGITS for number in digits):
        joined = "".join(stems)
        with suppress(ValueError):
            found = bytes.fromhex(joined)
            if found.hex() == joined:  # fromhex takes spaces and capitals too
                ends = accumulate(number // 2 for number in digits)
                return [
                    cast("RecordKey", found[end - number // 2 : end])
                    for end, number in zip(ends, digits, strict=True)
                ]
    return [chunk_key(name) for name in names]


def new_temporary(directory: str) -> str:
    """A path for a temporary that no other process or thread will choose."""
    token = f"{os.getpid()}-{os.urandom(8).hex()}"
    return f"{directory}/{TEMPORARY_DIRECTORY}/{token}{_TEMPORARY_SUFFIX}"


def check_blob(blob: bytes, namespace: bytes, key: RecordKey) -> None:
    """Raise DiskError "corrupt", or "foreign" if written for another namespace or key.

    Two facts of FORMAT.md are enough, so this needs no codec and no torch: bytes 60 to 75 are
    XXH3-128(identity, key), and the last 16 bytes are the XXH3-128 of all before them. They
    find accidents, not somebody who can write the directory.
    """
    if len(blob) < MIN_BLOB_BYTES:
        raise DiskError("corrupt", f"{len(blob)} bytes are too few for a blob")
    end = len(blob) - CHECKSUM_BYTES
    if xxhash.xxh3_128_digest(memoryview(blob)[:end]) != blob[end:]:
        raise DiskError("corrupt", f"the {len(blob)} bytes were altered after writing")
    found = blob[IDENTITY_OFFSET : IDENTITY_OFFSET + IDENTITY_BYTES]
    if found != xxhash.xxh3_128_digest(namespace + key):
        raise DiskError("foreign", "written for another namespace or under another key")
