"""Small JSON files: what a namespace is, for people, and the layout's version."""

from __future__ import annotations

import os
from contextlib import suppress

import msgspec

from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.layout import (
    LAYOUT_FILE,
    LAYOUT_VERSION,
    RECORD_FILE,
    new_temporary,
)

MAX_RECORD_BYTES = 65536


class NamespaceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a namespace for `kvtc inspect`; engines decide nothing by them.

    `kvtc gc` decides one thing by them: a generation that nobody uses has ended.
    """

    model: str
    """Its name, or the last part of its directory."""
    codec: str
    """Name of the codec."""
    dtype: str
    """Of the cache."""
    rank: int
    """Tensor-parallel rank whose chunks these are, from 0."""
    tp_size: int
    """Number of tensor-parallel ranks."""
    artifact: str = ""
    """Hex of its fingerprint; empty for raw."""
    ratio: float = 1.0
    """Target ratio; 1 for raw."""
    vllm_version: str = ""
    """Of the engine that made the namespace."""
    created: int = 0
    """Seconds since the epoch."""
    generation: str = ""
    """Hex of the nonce that is part of the namespace's identity; empty for a namespace that every
    engine with the same set-up names again."""
    facts: dict[str, str] = msgspec.field(default_factory=dict)
    """Name -> short digest or text of what makes up the identity, to see in what two namespaces
    differ."""


class _Layout(msgspec.Struct):
    layout: int


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
        return msgspec.json.decode(
            read_small(fs, f"{directory}/{RECORD_FILE}"), type=NamespaceRecord
        )
    except (DiskError, msgspec.DecodeError):
        return None


def write_record(fs: CheckedFileSystem, directory: str, record: NamespaceRecord) -> None:
    """Write the record unless there is one. Call under the root's lock.

    One that would be too large to be read is written without its facts.
    """
    if read_record(fs, directory) is not None:
        return
    content = msgspec.json.encode(record)
    if len(content) > MAX_RECORD_BYTES:
        content = msgspec.json.encode(msgspec.structs.replace(record, facts={}))
    write_small(fs, directory, f"{directory}/{RECORD_FILE}", content)


def has_layout(fs: CheckedFileSystem, root: str) -> bool:
    """True for a tier that this code reads, False if `root` is none yet.

    Raises DiskError "layout" for any other version.
    """
    content = read_small(fs, f"{root}/{LAYOUT_FILE}")
    if not content:
        return False
    try:
        version = msgspec.json.decode(content, type=_Layout).layout
    except msgspec.DecodeError as error:
        raise DiskError("layout", f"{root}/{LAYOUT_FILE}: {error}") from error
    if version != LAYOUT_VERSION:
        raise DiskError("layout", f"{root} has layout {version}, this build {LAYOUT_VERSION}")
    return True


def write_layout(fs: CheckedFileSystem, root: str, directory: str) -> None:
    """Make `root` a tier, by way of a namespace's directory. Call under the root's lock."""
    content = msgspec.json.encode(_Layout(LAYOUT_VERSION))
    write_small(fs, directory, f"{root}/{LAYOUT_FILE}", content)
