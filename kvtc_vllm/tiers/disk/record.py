"""Small JSON files: what a namespace is, for people, and the layout's version."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Annotated

import msgspec
import xxhash
from msgspec import Meta

from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.layout import (
    LAYOUT_FILE,
    LAYOUT_VERSION,
    LEDGER_FILE,
    RECORD_FILE,
    new_temporary,
)
from kvtc_vllm.tiers.disk.places import clear_directory, clear_place
from kvtc_vllm.tiers.disk.scan import namespaces

MAX_RECORD_BYTES = 65536

_Number = Annotated[int, Meta(ge=0, lt=2**62)]
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
"""What decoding raises, whatever the bytes are."""


class NamespaceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a namespace, for `kvtc inspect`.

    Two things are decided by them: `kvtc gc` takes a generation that nobody uses for ended, and
    engines of other namespaces take files above `most_bytes` for damaged.
    """

    model: str
    """Its name, or the last part of its directory."""
    codec: str
    """Name of the codec."""
    dtype: str
    """Of the cache."""
    rank: _Number
    """Rank whose chunks these are, from 0, over all pipeline stages."""
    tp_size: _Number
    """Number of ranks."""
    artifact: str = ""
    """Hex of its fingerprint; empty for raw."""
    ratio: float = 1.0
    """Target ratio; 1 for raw."""
    vllm_version: str = ""
    """Of the engine that made the namespace."""
    created: _Number = 0
    """Seconds since the epoch."""
    generation: str = ""
    """Hex of the nonce that is part of the namespace's identity; empty for a namespace that every
    engine with the same set-up names again."""
    most_bytes: _Number = 0
    """Of a chunk; 0 if it is not known."""
    facts: dict[str, str] = msgspec.field(default_factory=dict)
    """Name -> short digest or text of what makes up the identity, to see in what two namespaces
    differ."""


class _Layout(msgspec.Struct, omit_defaults=True):
    layout: _Number
    checksum: str = ""
    """XXH3-128 of "layout" and the number. A file without it that names another version than
    this build's is damaged."""


def read_small(fs: CheckedFileSystem, path: str) -> bytes:
    """Content of a small file; empty if there is none or it is too large."""
    if fs.stat(path) is None:
        return b""
    fd = fs.open(path, os.O_RDONLY)
    try:
        size = fs.fstat(fd).size
        return fs.read_all(fd, size) if size <= MAX_RECORD_BYTES else b""
    finally:
        fs.close_quietly(fd)


def write_small(fs: CheckedFileSystem, directory: str, path: str, content: bytes) -> None:
    """Write a small file at `path`, by way of a temporary of the namespace in `directory`.

    Call under the root's lock, under which a temporary needs no lock of its own.
    """
    temporary = new_temporary(directory)
    fs.mkdir(os.path.dirname(temporary))
    fd = fs.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        try:
            fs.write_all(fd, content)
        finally:
            fs.close_quietly(fd)
        fs.rename(temporary, path)
    except DiskError:
        with suppress(DiskError):
            fs.unlink(temporary)
        raise


def read_record(fs: CheckedFileSystem, directory: str) -> NamespaceRecord | None:
    """The record of a namespace's directory, None if absent or unreadable."""
    try:
        content = read_small(fs, f"{directory}/{RECORD_FILE}")
        return msgspec.json.decode(content, type=NamespaceRecord)
    except (DiskError, *_UNREADABLE):
        return None


def write_record(fs: CheckedFileSystem, root: str, directory: str, record: NamespaceRecord) -> bool:
    """Write the record unless there is one. Call under the root's lock.

    One that would be too large to be read is written without its facts. Returns whether a
    damaged one was replaced.
    """
    if read_record(fs, directory) is not None:
        return False
    path = f"{directory}/{RECORD_FILE}"
    damaged = fs.stat(path) is not None
    content = msgspec.json.encode(record)
    if len(content) > MAX_RECORD_BYTES:
        content = msgspec.json.encode(msgspec.structs.replace(record, facts={}))
    clear_directory(fs, root, path)
    write_small(fs, directory, path, content)
    return damaged


def layout_damage(fs: CheckedFileSystem, root: str) -> str | None:
    """None for a tier that this code reads; else what is wrong with its `layout.json`.

    "" if there is none, so that `root` is no tier yet. Raises DiskError "layout" for a version of
    another build, and for a file that cannot be told from somebody else's.
    """
    path = f"{root}/{LAYOUT_FILE}"
    try:
        content = read_small(fs, path)
    except DiskError as error:
        if error.reason not in ("foreign", "corrupt"):
            raise
        return _damaged(fs, root, str(error))
    if not content:
        return "" if fs.stat(path) is None else _damaged(fs, root, "it is empty or too large")
    try:
        found = msgspec.json.decode(content, type=_Layout)
    except _UNREADABLE as error:
        return _damaged(fs, root, str(error))
    if found.checksum == _seal(found.layout):
        if found.layout == LAYOUT_VERSION:
            return None
        raise DiskError("layout", f"{root} has layout {found.layout}, this build {LAYOUT_VERSION}")
    if not found.checksum and found.layout == LAYOUT_VERSION:
        return None  # as written before there was a checksum
    return _damaged(fs, root, "its checksum does not fit")


def write_layout(fs: CheckedFileSystem, root: str, directory: str) -> None:
    """Make `root` a tier, by way of a namespace's directory. Call under the root's lock.

    A damaged file goes aside.
    """
    path = f"{root}/{LAYOUT_FILE}"
    if fs.stat(path) is not None:
        clear_place(fs, root, path)
    content = msgspec.json.encode(_Layout(LAYOUT_VERSION, _seal(LAYOUT_VERSION)))
    write_small(fs, directory, path, content)


def _damaged(fs: CheckedFileSystem, root: str, problem: str) -> str:
    """The problem, if the rest of the directory is ours. Raises DiskError "layout" if not."""
    if fs.stat(f"{root}/{LEDGER_FILE}") is None and not namespaces(fs, root):
        raise DiskError(
            "layout",
            f"{root}/{LAYOUT_FILE} is not a disk tier's ({problem}); name another directory",
        )
    return problem


def _seal(version: int) -> str:
    return xxhash.xxh3_128_hexdigest(b"layout %d" % version)
