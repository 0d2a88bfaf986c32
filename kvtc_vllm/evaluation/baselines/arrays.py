"""Bytes -> tensors, positions <-> bits, and what the baselines share about number formats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvtc_vllm.codec.quantizers.base import to_fp16


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
