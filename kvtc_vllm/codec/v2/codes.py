"""Codes of one section <-> the streams of its payload. Integers only; FORMAT.md, section 9.

Codes are component-major: all tokens of one coefficient lie together. Every coefficient has a
width, 2, 4 or 8 bits, in which its codes are packed. The largest number of a width is an escape:
what the code exceeds it by is in a stream behind the packed codes, and what does not fit a byte
there is in one behind that. So the place of every packed code follows from the widths and the
number of tokens alone, and the rest of the payload from the packed codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.packing import pack, packed_size, unpack
from kvtc_vllm.codec.shuffle import to_bytes

WIDTHS = (2, 4, 8)
"""Bits of packed codes, in stored order."""
WIDE = 255
"""In a stream of escapes: the rest is in the wide stream."""
WIDE_BYTES = 2
MAX_ESCAPE_BYTES = 1 + WIDE_BYTES
MAX_LEVEL = 32_767
"""Largest magnitude of a quantised coefficient, in steps."""


@dataclass(frozen=True)
class PackedColumns:
    """Coefficients whose codes are packed in one width.

    columns: their numbers, int64 [n], rising.
    """

    width: int
    columns: torch.Tensor

    @property
    def escape(self) -> int:
        return (1 << self.width) - 1

    def packed_bytes(self, tokens: int) -> int:
        """Bytes of all packed codes; those of each coefficient begin at a byte."""
        return len(self.columns) * packed_size(tokens, self.width)


def packed_columns(widths: torch.Tensor) -> tuple[PackedColumns, ...]:
    """Of every width in use. widths: uint8 [r], of each coefficient."""
    found = ((width, (widths == width).nonzero().flatten()) for width in WIDTHS)
    return tuple(PackedColumns(width, columns) for width, columns in found if len(columns))


def least_length(parts: Sequence[PackedColumns], tokens: int) -> int:
    """Bytes of a payload without escapes."""
    return sum(part.packed_bytes(tokens) for part in parts)


def most_length(parts: Sequence[PackedColumns], tokens: int) -> int:
    """Bytes of a payload in which every code is a wide escape."""
    columns = sum(len(part.columns) for part in parts)
    return least_length(parts, tokens) + MAX_ESCAPE_BYTES * columns * tokens


def encode_codes(codes: torch.Tensor, parts: Sequence[PackedColumns]) -> list[bytes]:
    """Codes int32 [r, T], none negative and none above 2 * MAX_LEVEL -> streams.

    One stream of packed codes per width, then one of escapes per width that has any, then the wide
    one if there is any.
    """
    streams: list[bytes] = []
    escapes: list[torch.Tensor] = []
    for part in parts:
        own = codes[part.columns.to(codes.device)]
        streams.append(to_bytes(pack(own.clamp_max(part.escape).to(torch.uint8), part.width)))
        escapes.append(own[own >= part.escape] - part.escape)
    streams += [to_bytes(beyond.clamp_max(WIDE).to(torch.uint8)) for beyond in escapes]
    wide = torch.cat([beyond[beyond >= WIDE] - WIDE for beyond in escapes]) if escapes else codes
    if wide.numel():
        streams.append(to_bytes(wide.to(torch.int32).view(torch.uint8).view(-1, 4)[:, :WIDE_BYTES]))
    return [stream for stream in streams if stream]


def decode_codes(
    payload: bytearray, parts: Sequence[PackedColumns], rank: int, tokens: int, device: torch.device
) -> torch.Tensor:
    """Inverse of `encode_codes`: int32 [rank, tokens]; of a wrong payload none is above 2^17.

    Raises ContainerError("bounds") if escapes and payload do not come out even.
    """
    codes = torch.zeros((rank, tokens), dtype=torch.int32, device=device)
    if not parts:
        return codes
    data = _Reader(torch.frombuffer(payload, dtype=torch.uint8).to(device))
    for part in parts:
        size = packed_size(tokens, part.width)
        packed = data.take(part.packed_bytes(tokens)).view(-1, size)
        codes[part.columns.to(device)] = unpack(packed, part.width, tokens).int()
    escaped = [codes[part.columns.to(device)] == part.escape for part in parts]
    beyond = [data.take(int(places.sum())).int() for places in escaped]
    wide = [escapes == WIDE for escapes in beyond]
    for escapes, places in zip(beyond, wide, strict=True):
        low, high = data.take(WIDE_BYTES * int(places.sum())).view(-1, WIDE_BYTES).int().unbind(1)
        escapes[places] += low + (high << 8)
    if data.left:
        raise uneven_escapes()
    for part, places, escapes in zip(parts, escaped, beyond, strict=True):
        own = codes[part.columns.to(device)]
        own[places] += escapes
        codes[part.columns.to(device)] = own
    return codes


def uneven_escapes() -> ContainerError:
    """What to raise if the packed codes ask for other escapes than follow them."""
    return ContainerError("bounds", "escapes do not end where the payload does")


class _Reader:
    """Takes pieces off the front of a payload."""

    def __init__(self, data: torch.Tensor) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> torch.Tensor:
        if size > self.left:
            raise uneven_escapes()
        self._at += size
        return self._data[self._at - size : self._at]
