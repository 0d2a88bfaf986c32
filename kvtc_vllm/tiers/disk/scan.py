"""Reading directories: the chunks of a namespace, and temporaries that nobody writes any more."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from operator import attrgetter
from stat import S_ISDIR, S_ISREG

import msgspec

from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.layout import (
    CHUNK_SUFFIX,
    LINK_SUFFIX,
    TEMPORARY_DIRECTORY,
    disk_bytes,
    fan_out_path,
    is_fan_out,
    is_namespace,
    is_temporary,
    keys_of_names,
)
from kvtc_vllm.tiers.keys import RecordKey


class ChunkFile(msgspec.Struct, frozen=True, gc=False):
    """A published chunk.

    mtime_ns: last use. length: bytes of the blob. namespace: directory name. Python's cycle
    collector does not know of these objects, or a million of them would stop the process.
    """

    mtime_ns: int
    key: RecordKey
    length: int
    namespace: str


last_use = attrgetter("mtime_ns")
"""Of a `ChunkFile`, as `in_order` takes it."""

KnownFile = tuple[int, int, int]
"""Of a list: inode, length in bytes, last use in nanoseconds since the epoch. A plain tuple of
integers, which Python's collector soon leaves alone."""
NAMES_AT_ONCE = 1024
"""Read in one go, without giving Python's lock away."""
UNKNOWN_SHARE = 8
"""Where more than one file in so many of a directory is not known, all are asked for."""


@contextmanager
def without_collector() -> Iterator[None]:
    """Stop Python's cycle collector while the block runs.

    Hundreds of thousands of small objects, none in a cycle, would make it walk the heap of
    the whole process several times. A race of two threads only ends the pause early.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def namespaces(fs: CheckedFileSystem, root: str) -> list[str]:
    """Directory names of the namespaces under `root`, sorted."""
    return sorted(
        name for name, mode, _, _ in fs.list(root) if S_ISDIR(mode) and is_namespace(name)
    )


def fan_outs(fs: CheckedFileSystem, directory: str) -> set[int]:
    """Numbers of the fan-out directories that a namespace has."""
    return {
        int(name, 16)
        for name, mode, _, _ in fs.list(directory)
        if S_ISDIR(mode) and is_fan_out(name)
    }


def chunks_in(
    fs: CheckedFileSystem,
    directory: str,
    number: int,
    known: Mapping[RecordKey, KnownFile] | None = None,
    links: list[str] | None = None,
) -> Iterator[ChunkFile]:
    """The chunks in one fan-out directory of a namespace, in no order.

    known: what need not be asked for, as long as the inodes are the same. links: gets the names of
    links to representatives, see `reference`.
    """
    found = _known_chunks(fs, directory, number, known, links) if known else None
    if found is not None:
        yield from found
        return
    namespace = directory.rpartition("/")[2]
    entries = []
    for entry in fs.list(fan_out_path(directory, number)):
        if S_ISREG(entry[1]) and entry[0].endswith(CHUNK_SUFFIX):
            entries.append(entry)
        elif links is not None and entry[0].endswith(LINK_SUFFIX):
            links.append(entry[0])
    for start in range(0, len(entries), NAMES_AT_ONCE):
        some = entries[start : start + NAMES_AT_ONCE]
        keys = keys_of_names([name for name, _, _, _ in some])
        yield from [
            ChunkFile(mtime_ns, key, size, namespace)
            for key, (_, _, size, mtime_ns) in zip(keys, some, strict=True)
            if key is not None and key[0] == number
        ]


def _known_chunks(
    fs: CheckedFileSystem,
    directory: str,
    number: int,
    known: Mapping[RecordKey, KnownFile],
    links: list[str] | None,
) -> list[ChunkFile] | None:
    """None if too little is known of what is there; `links` is then as it was."""
    namespace = directory.rpartition("/")[2]
    place = fan_out_path(directory, number)
    found, others, linked = [], [], []
    names = fs.names(place)
    chunk_names = []
    for entry in names:
        if entry[0].endswith(CHUNK_SUFFIX):
            chunk_names.append(entry)
        elif entry[0].endswith(LINK_SUFFIX):
            linked.append(entry[0])
    for start in range(0, len(chunk_names), NAMES_AT_ONCE):
        some = chunk_names[start : start + NAMES_AT_ONCE]
        keys = keys_of_names([name for name, _ in some])
        for key, (name, inode) in zip(keys, some, strict=True):
            if key is None or key[0] != number:
                continue
            file = known.get(key)
            if file is not None and file[0] == inode:
                found.append(ChunkFile(file[2], key, file[1], namespace))
            else:
                others.append((name, key))
    if len(others) * UNKNOWN_SHARE > len(names):
        return None
    for name, key in others:
        there = fs.stat(f"{place}/{name}")
        if there is not None and there.is_regular:
            found.append(ChunkFile(there.mtime_ns, key, there.size, namespace))
    if links is not None:
        links += linked
    return found


def chunks(fs: CheckedFileSystem, directory: str) -> Iterator[ChunkFile]:
    """The chunks in a namespace's directory, in no order."""
    for number in sorted(fan_outs(fs, directory)):
        yield from chunks_in(fs, directory, number)


def temporaries(fs: CheckedFileSystem, directory: str) -> list[tuple[str, int]]:
    """Path and length in bytes of the files in a namespace that are still being written."""
    place = f"{directory}/{TEMPORARY_DIRECTORY}"
    return [
        (f"{place}/{name}", size)
        for name, mode, size, _ in fs.list(place)
        if S_ISREG(mode) and is_temporary(name)
    ]


def remove_orphans(fs: CheckedFileSystem, directory: str) -> int:
    """Remove the temporaries of dead writers; returns the bytes of the others.

    Call under the root's lock, under which writers create and lock their temporaries.
    """
    kept = 0
    for path, length in temporaries(fs, directory):
        if not _remove_if_dead(fs, path):
            kept += disk_bytes(length)
    return kept


def _remove_if_dead(fs: CheckedFileSystem, path: str) -> bool:
    """False if its writer lives or it cannot be removed."""
    with suppress(DiskError):
        fd = fs.open(path, os.O_RDWR)
        try:
            if fs.try_lock(fd):
                fs.unlink(path)
                return True
        finally:
            fs.close_quietly(fd)
    return False
