"""deflate: raw DEFLATE (RFC 1951) units of about 8 KiB, by isal on the CPU; reads up to 64 KiB.

The bytes are those of any other raw DEFLATE: zlib, libdeflate and nvCOMP read
them. DEFLATE has no checksum of its own (most single-bit flips decode to wrong
bytes of the right length), so units are only decoded after the container's
checksum has been verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from isal import igzip_lib, isal_zlib

from kvtc_vllm.codec.entropy.base import (
    MAX_UNIT_BYTES,
    UNIT_TARGET,
    EncodedSection,
    Unit,
    aligned,
    length_parts,
    padded,
    unit_size,
)
from kvtc_vllm.codec.errors import ContainerError

RAW_DEFLATE_WINDOW = -15
_NO_HISTORY = 1
"""Bits of a window that holds runs and nothing else."""
# isal's stubs declare the exception as an instance.
_INFLATE_ERROR = cast(type[Exception], isal_zlib.IsalError)


@dataclass(frozen=True)
class DeflateCoder:
    """isal at `level` 0 (fastest) to 3; a unit that would not shrink is stored.

    unit_bytes: units are of about so many: a Huffman table for each, where statistics change along
    a stream. matches: look for repeated bytes; without, the window is too short for any but runs.
    On the packed codes of step plans that is 4 to 5 % smaller than with matches, and smaller than
    zlib's strategies for runs and for Huffman codes alone, at more than twice their speed.

    On packed codes levels 1, 2 and 3 give the same size within 0.1 % (matches
    hardly ever help, the Huffman table does), so the default is the fastest
    of them; level 0 gains nothing at all.
    """

    level: int = 1
    matches: bool = True
    unit_bytes: int = UNIT_TARGET
    name: str = "deflate"
    coder_id: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 3:
            raise ValueError(f"DEFLATE level {self.level} is outside 0..3")
        if not 1 <= self.unit_bytes <= MAX_UNIT_BYTES:
            raise ValueError(f"units of {self.unit_bytes} bytes are outside 1..{MAX_UNIT_BYTES}")

    def encode(self, streams: Sequence[bytes]) -> EncodedSection:
        units: list[Unit] = []
        pieces: list[bytes] = []
        for stream in streams:
            size = unit_size(len(stream), self.unit_bytes)
            for start in range(0, len(stream), size):
                raw = stream[start : start + size]
                stored = self.encode_unit(raw)
                units.append(Unit(len(raw), len(stored)))
                pieces.append(padded(stored))
        return EncodedSection(tuple(units), b"".join(pieces))

    def encode_unit(self, raw: bytes) -> bytes:
        """Stored bytes of one unit, without padding; `raw` if it would not shrink."""
        stored = self._deflate(raw)
        return stored if len(stored) < len(raw) else raw

    def _deflate(self, raw: bytes) -> bytes:
        if self.matches:
            return isal_zlib.compress(raw, self.level, wbits=RAW_DEFLATE_WINDOW)
        return igzip_lib.compress(raw, self.level, igzip_lib.COMP_DEFLATE, hist_bits=_NO_HISTORY)

    def decode(self, units: Sequence[Unit], body: memoryview, raw_length: int) -> bytearray:
        # Nothing is made of units whose sums are wrong: there may be millions.
        sums = [(part[:, 0].sum(), aligned(part[:, 1]).sum()) for part in length_parts(units)]
        if sum(raw for raw, _ in sums) != raw_length:
            raise ContainerError("entropy", f"units do not add up to {raw_length} bytes")
        if sum(stored for _, stored in sums) != len(body):
            raise ContainerError("entropy", f"units do not fill the {len(body)} stored bytes")
        raw = bytearray(raw_length)
        written = read = 0
        for part in length_parts(units):
            for unit_raw, unit_stored in part.tolist():
                end = read + aligned(unit_stored)
                stored = body[read : read + unit_stored]
                if any(body[read + unit_stored : end]):
                    raise ContainerError("entropy", "padding between units is not zero")
                raw[written : written + unit_raw] = _inflate(stored, unit_raw)
                written += unit_raw
                read = end
        return raw


def _inflate(stored: memoryview, raw_length: int) -> bytes | memoryview:
    if len(stored) == raw_length:
        return stored
    inflater = isal_zlib.decompressobj(RAW_DEFLATE_WINDOW)
    try:
        raw = inflater.decompress(stored, raw_length)
        if len(raw) == raw_length and not inflater.eof:
            # The end-of-block code may still be unread; nothing else may follow.
            raw += inflater.decompress(inflater.unconsumed_tail, 1)
    except _INFLATE_ERROR as error:
        raise ContainerError("entropy", f"invalid DEFLATE data ({error})") from error
    if len(raw) != raw_length or not inflater.eof or inflater.unused_data:
        raise ContainerError("entropy", f"unit does not decode to {raw_length} bytes")
    return raw


DEFLATE = DeflateCoder()
