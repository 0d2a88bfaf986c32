"""The entropy-coder interface: streams of one section <-> the bytes in the blob.

A section is handed over as several streams whose statistics differ, and read
back as their concatenation. A coder cuts streams into *units*: pieces that
decode alone, listed in the container so that a GPU can decode all of them at
once. Every unit starts on a multiple of `UNIT_ALIGNMENT` bytes of the body
(the input alignment that nvCOMP asks for); the gaps are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

UNIT_ALIGNMENT = 4
MAX_UNIT_BYTES = 65536
"""Largest raw unit: the limit of nvCOMP's DEFLATE and of the 16-bit unit table."""


def aligned(length: int) -> int:
    """`length` rounded up to the unit alignment."""
    return -(-length // UNIT_ALIGNMENT) * UNIT_ALIGNMENT


@dataclass(frozen=True)
class Unit:
    """Sizes of one unit in bytes, 1 <= stored_length <= raw_length <= MAX_UNIT_BYTES.

    Equal lengths mean that the unit is stored as it is.
    """

    raw_length: int
    stored_length: int


@dataclass(frozen=True)
class EncodedSection:
    """What a coder made of one section: its unit table and its body."""

    units: tuple[Unit, ...]
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
        """Give back exactly `raw_length` bytes, a length that the caller has already checked.

        Never produces more than `raw_length` bytes in all. Raises
        ContainerError("entropy") if units and body do not give exactly that.
        """
        ...
