"""The entropy-coder interface: streams of one section <-> the bytes in the blob.

A section is handed over as several streams whose statistics differ, and read
back as their concatenation. A coder cuts streams into *units*: pieces that
decode alone, listed in the container so that a GPU can decode all of them at
once. Every unit starts on a multiple of `UNIT_ALIGNMENT` bytes of the body
(the input alignment that nvCOMP asks for); the gaps are zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar, overload

import numpy as np
import numpy.typing as npt

from kvtc_vllm.codec.errors import CodecError

UNIT_ALIGNMENT = 4
MAX_UNIT_BYTES = 65536
"""Largest raw unit: the limit of nvCOMP's DEFLATE and of the 16-bit unit table."""
UNIT_TARGET = 8192
"""Raw bytes, about, of the units that writers cut. Against units of 64 KiB this costs at most half
a per cent of the stored bytes; a GPU decodes no faster than its longest unit, 0.1 ms per KiB."""
UNIT_BYTES = 4
"""Bytes of a unit's entry in the unit table."""
_UNITS_AT_ONCE = 4096

Bytes = TypeVar("Bytes", int, npt.NDArray[np.int64])


def aligned(length: Bytes) -> Bytes:
    """`length`, or each of an array of them, rounded up to the unit alignment."""
    # A power of two; of arrays, a division takes ten times as long.
    return (length + (UNIT_ALIGNMENT - 1)) & -UNIT_ALIGNMENT


def padded(stored: bytes) -> bytes:
    """The bytes with zeros up to the unit alignment."""
    return stored.ljust(aligned(len(stored)), b"\0")


@dataclass(frozen=True)
class Unit:
    """Sizes of one unit in bytes, 1 <= stored_length <= raw_length <= MAX_UNIT_BYTES.

    Equal lengths mean that the unit is stored as it is.
    """

    raw_length: int
    stored_length: int


class UnitList(Sequence[Unit]):
    """The units of one section as they lie in a container, read when asked for.

    table: little-endian 16-bit pairs (raw length - 1, stored length - 1). A large batch has
    thousands of units, too many to make an object of each.
    """

    def __init__(self, table: bytes | memoryview) -> None:
        self.table = table

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int64]) -> UnitList:
        """From raw and stored lengths, int64 [n, 2]. Raises CodecError if one does not fit."""
        if lengths.size and not 1 <= lengths.min() <= lengths.max() <= MAX_UNIT_BYTES:
            raise CodecError(
                "size",
                f"a unit of {lengths.min()} or {lengths.max()} bytes does not fit, only 1 to "
                f"{MAX_UNIT_BYTES} do",
            )
        return cls((lengths - 1).astype("<u2").tobytes())

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [n, 2]: raw and stored lengths in bytes."""
        return np.frombuffer(self.table, "<u2").reshape(-1, 2).astype(np.int64) + 1

    def __len__(self) -> int:
        return len(self.table) // UNIT_BYTES

    @overload
    def __getitem__(self, index: int) -> Unit: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Unit]: ...

    def __getitem__(self, index: int | slice) -> Unit | Sequence[Unit]:
        if isinstance(index, slice):
            return [Unit(*pair) for pair in self.lengths[index].tolist()]
        return Unit(*self.lengths[index].tolist())

    def __iter__(self) -> Iterator[Unit]:
        return (Unit(*pair) for pair in self.lengths.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


def unit_size(stream: int, target: int = UNIT_TARGET) -> int:
    """Raw bytes of the units of a stream of so many bytes: all but the last, of about `target`."""
    units = max(1, round(stream / target), -(-stream // MAX_UNIT_BYTES))
    return max(1, -(-stream // units))


def cut_units(streams: Iterable[int]) -> Iterator[int]:
    """Raw bytes of the units of streams of so many bytes, in order, as writers cut them."""
    for stream in streams:
        size = unit_size(stream)
        for first in range(0, stream, size):
            yield min(size, stream - first)


def max_stored_bytes(streams: Iterable[int]) -> int:
    """Most bytes that streams of so many bytes take in a blob as units, their table included.

    A unit that would not shrink is stored as it is, so this is what storing all of them takes.
    """
    return sum(UNIT_BYTES + aligned(unit) for unit in cut_units(streams))


def unit_lengths(units: Sequence[Unit]) -> npt.NDArray[np.int64]:
    """int64 [n, 2]: raw and stored lengths in bytes."""
    if isinstance(units, UnitList):
        return units.lengths
    pairs = [(unit.raw_length, unit.stored_length) for unit in units]
    return np.array(pairs, np.int64).reshape(-1, 2)


def length_parts(units: Sequence[Unit]) -> Iterator[npt.NDArray[np.int64]]:
    """The rows of `unit_lengths`, some thousand at a time: a hostile table has millions."""
    listed = units if isinstance(units, UnitList) else UnitList.of(unit_lengths(units))
    step = _UNITS_AT_ONCE * UNIT_BYTES
    for first in range(0, len(listed.table), step):
        yield UnitList(listed.table[first : first + step]).lengths


@dataclass(frozen=True)
class EncodedSection:
    """What a coder made of one section: its unit table and its body."""

    units: Sequence[Unit]
    body: bytes


class EntropyCoder(Protocol):
    """A way of storing section payloads.

    name: key in the registry. coder_id: its number in the file format, never
    reused. Two coders may share a number only if each decodes what the other
    encodes.
    """

    @property
    def name(self) -> str: ...

    @property
    def coder_id(self) -> int: ...

    def encode(self, streams: Sequence[bytes]) -> EncodedSection:
        """Encode the concatenation of `streams`; no unit crosses from one into the next."""
        ...

    def decode(self, units: Sequence[Unit], body: memoryview, raw_length: int) -> bytearray:
        """Inverse of `encode`: exactly `raw_length` bytes, a length that the caller has checked.

        Never produces more than `raw_length` bytes in all. Raises
        ContainerError("entropy") if units and body do not give exactly that.
        """
        ...
