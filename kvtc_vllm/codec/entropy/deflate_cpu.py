"""deflate: raw DEFLATE (RFC 1951) units of at most 64 KiB, by isal or zlib on the CPU.

The bytes are those of any other raw DEFLATE: zlib, libdeflate and nvCOMP read
them. DEFLATE has no checksum of its own (most single-bit flips decode to wrong
bytes of the right length), so units are only decoded after the container's
checksum has been verified.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from isal import isal_zlib

from kvtc_vllm.codec.entropy.base import (
    MAX_UNIT_BYTES,
    EncodedSection,
    Unit,
    aligned,
)
from kvtc_vllm.codec.errors import ContainerError

RAW_DEFLATE_WINDOW = -15
_ZLIB_LEVEL = 6
_ZLIB_MEMORY = 9
# isal's stubs declare the exception as an instance.
_INFLATE_ERROR = cast(type[Exception], isal_zlib.IsalError)


@dataclass(frozen=True)
class DeflateCoder:
    """isal at `level` 0 (fastest) to 3; a unit that would not shrink is stored.

    matches: look for repeated bytes. Without, only runs of one byte are shortened, by zlib, whose
    effort does not depend on `level` then.

    On packed codes levels 1, 2 and 3 give the same size within 0.1 % (matches
    hardly ever help, the Huffman table does), so the default is the fastest
    of them; level 0 gains nothing at all.
    """

    level: int = 1
    matches: bool = True
    name: str = "deflate"
    coder_id: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 3:
            raise ValueError(f"DEFLATE level {self.level} is outside 0..3")

    def encode(self, streams: Sequence[bytes]) -> EncodedSection:
        units: list[Unit] = []
        pieces: list[bytes] = []
        for stream in streams:
            for start in range(0, len(stream), MAX_UNIT_BYTES):
                raw = stream[start : start + MAX_UNIT_BYTES]
                stored = self._deflate(raw)
                if len(stored) >= len(raw):
                    stored = raw
                units.append(Unit(len(raw), len(stored)))
                pieces.append(stored.ljust(aligned(len(stored)), b"\0"))
        return EncodedSection(tuple(units), b"".join(pieces))

    def _deflate(self, raw: bytes) -> bytes:
        if self.matches:
            return isal_zlib.compress(raw, self.level, wbits=RAW_DEFLATE_WINDOW)
        deflater = zlib.compressobj(
            _ZLIB_LEVEL, zlib.DEFLATED, RAW_DEFLATE_WINDOW, _ZLIB_MEMORY, zlib.Z_RLE
        )
        return deflater.compress(raw) + deflater.flush()

    def decode(self, units: Sequence[Unit], body: memoryview, raw_length: int) -> bytearray:
        units = list(units)
        if sum(unit.raw_length for unit in units) != raw_length:
            raise ContainerError("entropy", f"units do not add up to {raw_length} bytes")
        if sum(aligned(unit.stored_length) for unit in units) != len(body):
            raise ContainerError("entropy", f"units do not fill the {len(body)} stored bytes")
        raw = bytearray(raw_length)
        written = read = 0
        for unit in units:
            end = read + aligned(unit.stored_length)
            stored = body[read : read + unit.stored_length]
            if any(body[read + unit.stored_length : end]):
                raise ContainerError("entropy", "padding between units is not zero")
            raw[written : written + unit.raw_length] = _inflate(stored, unit)
            written += unit.raw_length
            read = end
        return raw


def _inflate(stored: memoryview, unit: Unit) -> bytes | memoryview:
    if unit.stored_length == unit.raw_length:
        return stored
    inflater = isal_zlib.decompressobj(RAW_DEFLATE_WINDOW)
    try:
        raw = inflater.decompress(stored, unit.raw_length)
        if len(raw) == unit.raw_length and not inflater.eof:
            # The end-of-block code may still be unread; nothing else may follow.
            raw += inflater.decompress(inflater.unconsumed_tail, 1)
    except _INFLATE_ERROR as error:
        raise ContainerError("entropy", f"invalid DEFLATE data ({error})") from error
    if len(raw) != unit.raw_length or not inflater.eof or inflater.unused_data:
        raise ContainerError("entropy", f"unit does not decode to {unit.raw_length} bytes")
    return raw


DEFLATE = DeflateCoder()
