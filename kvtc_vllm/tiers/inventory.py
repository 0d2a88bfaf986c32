"""What a rank has on disk, as it goes from the worker to the scheduler.

A million pairs of a key and a number are a million objects. Python's cycle collector goes through
them, pickling makes bytes of them one by one, unpickling makes them again, and each of these keeps
Python's lock for up to a second. So the pairs are packed, some thousand in one bytes object.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from itertools import islice

from kvtc_vllm.tiers.keys import RecordKey

PIECE = 1024
"""Pairs in one object."""

Entry = tuple[RecordKey, int]
"""A key of at most 255 bytes, and bytes on disk, 0 to 2**63 - 1."""


class Inventory:
    """Keys and bytes, in order; can be gone through again and again, and pickled. Immutable."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._pieces: list[bytes] = []
        self._length = 0
        source = iter(entries)
        while piece := list(islice(source, PIECE)):
            self._length += len(piece)
            self._pieces.append(_pack(piece))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Entry]:
        for piece in self._pieces:
            width = piece[0]
            for used, key, size in _entry(width).iter_unpack(memoryview(piece)[1:]):
                yield RecordKey(key[:used]), size


def _pack(entries: list[Entry]) -> bytes:
    """The width of a key, then the entries."""
    keys, sizes = zip(*entries, strict=True)
    used = [*map(len, keys)]
    width = max(used)
    return bytes((width,)) + b"".join(map(_entry(width).pack, used, keys, sizes))


def _entry(width: int) -> struct.Struct:
    return struct.Struct(f"<B{width}sq")
