"""What baselines store: elements, positions, quantised groups and low-rank factors <-> bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from kvtc_vllm.codec.packing import pack, packed_size, unpack
from kvtc_vllm.codec.quantizers.base import to_fp16
from kvtc_vllm.codec.quantizers.uniform import INT2, UniformQuantizer
from kvtc_vllm.codec.shuffle import to_bytes

PARTS = 3
"""Byte strings of one set of groups: codes, zero points, scales."""


def from_bytes(data: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Inverse of `codec.shuffle.to_bytes`. Raises RuntimeError where size and shape disagree."""
    if not data.nbytes:  # which torch.frombuffer refuses
        return torch.empty(0, dtype=dtype).reshape(*shape)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(*shape)


def to_cache(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 -> cache dtype; an error past the largest float16 saturates."""
    return to_fp16(x) if dtype == torch.float16 else x.to(dtype)


def sixteen_bit(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit format that holds cache elements best: the cache's own, if it has 16 bits."""
    return dtype if dtype.itemsize == 2 else torch.float16


def to_sixteen_bit(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cache elements as float32 -> `sixteen_bit` of the cache dtype, saturating."""
    return to_cache(x, sixteen_bit(dtype))


def position_bits(length: int) -> int:
    """Bits of one position below `length`."""
    return (length - 1).bit_length()


def pack_positions(positions: torch.Tensor, length: int) -> bytes:
    """Positions below `length`, `position_bits(length)` bits each, padded to a whole byte."""
    bits = np.arange(position_bits(length))
    spread = (positions.flatten().numpy()[:, None] >> bits) & 1
    return np.packbits(spread.astype(np.uint8), bitorder="little").tobytes()


def unpack_positions(data: memoryview, length: int, shape: Sequence[int]) -> torch.Tensor:
    """Inverse of `pack_positions`: int64 of the given shape."""
    width = position_bits(length)
    count = int(np.prod(shape))
    bits = np.unpackbits(np.array(data, dtype=np.uint8), bitorder="little", count=count * width)
    powers = 1 << np.arange(width, dtype=np.int64)
    return torch.from_numpy(bits.reshape(count, width).astype(np.int64) @ powers).reshape(*shape)


def quantize_groups(groups: torch.Tensor, quantizer: UniformQuantizer = INT2) -> list[bytes]:
    """float32 [..., size], one group along the last dimension -> `PARTS` byte strings.

    KIVI's groups, which GEAR shares: codes, a float16 zero point and scale per group.
    """
    codes, zero, scale = quantizer.quantize(groups)
    return [to_bytes(pack(codes.flatten(), quantizer.bits)), to_bytes(zero), to_bytes(scale)]


def dequantize_groups(
    parts: Sequence[memoryview], shape: Sequence[int], quantizer: UniformQuantizer = INT2
) -> torch.Tensor:
    """Inverse of `quantize_groups`: float32 of the given shape [..., size]."""
    codes, zero, scale = parts
    count, outer = math.prod(shape), shape[:-1]
    packed = from_bytes(codes, torch.uint8, (packed_size(count, quantizer.bits),))
    return quantizer.dequantize(
        unpack(packed, quantizer.bits, count).view(*shape),
        from_bytes(zero, torch.float16, outer),
        from_bytes(scale, torch.float16, outer),
    )


def low_rank(x: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., n, m] -> left [..., n, rank] and right [..., rank, m], both float16.

    left @ right is the best approximation of that rank in squared error, up to the
    rounding of the factors; rank is at most min(n, m). From the eigenvectors of the
    smaller Gram matrix in float64: several times faster than a singular value
    decomposition, and more exact than float16 can show.
    """
    wide = x.double()
    if x.shape[-2] < x.shape[-1]:
        left = _leading_eigenvectors(wide @ wide.mT, rank)
        return to_fp16(left), to_fp16(left.mT @ wide)
    right = _leading_eigenvectors(wide.mT @ wide, rank)
    return to_fp16(wide @ right), to_fp16(right.mT)


def _leading_eigenvectors(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Columns [..., n, rank] for the largest eigenvalues of symmetric [..., n, n]."""
    vectors: torch.Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[..., vectors.shape[-1] - rank :]
