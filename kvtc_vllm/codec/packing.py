"""Bit packing of 2-, 4- and 8-bit codes, least significant bits first.

Code i of a sequence occupies its bits [i * bits, (i + 1) * bits), bit 0 being the least
significant bit of byte 0. A sequence is padded with zero bits to a whole byte, so the place of
any code is known without reading the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

SUPPORTED_BITS = (2, 4, 8)


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` packed codes of `bits` bits."""
    return (count * bits + 7) // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack sequences of codes along the last dimension.

    codes: uint8 [..., count], every value below 2**bits. Returns uint8
    [..., packed_size(count, bits)]. Raises ValueError for other widths.
    """
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"codes of {bits} bits cannot be packed, only {SUPPORTED_BITS}")
    if bits == 8:
        return codes.contiguous()
    per_byte = 8 // bits
    missing = -codes.shape[-1] % per_byte
    if missing:
        codes = F.pad(codes, (0, missing))
    lanes = codes.reshape(*codes.shape[:-1], -1, per_byte)
    packed = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Inverse of `pack`: uint8 [..., packed_size(count, bits)] -> uint8 [..., count].

    Padding bits are not looked at. Raises ValueError for other widths and for
    a last dimension of the wrong size.
    """
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"codes of {bits} bits cannot be packed, only {SUPPORTED_BITS}")
    if packed.shape[-1] != packed_size(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, "
            f"not {packed.shape[-1]}"
        )
    if bits == 8:
        return packed
    per_byte = 8 // bits
    mask = (1 << bits) - 1
    codes = packed.new_empty((*packed.shape, per_byte))
    for lane in range(per_byte):
        codes[..., lane] = (packed >> (lane * bits)) & mask
    return codes.flatten(-2)[..., :count]
