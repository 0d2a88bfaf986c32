"""KIVI's 2-bit groups, which GEAR shares: codes, and a float16 scale and zero point a group."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kvtc_vllm.codec.packing import pack, packed_size, unpack
from kvtc_vllm.codec.quantizers.uniform import INT2
from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.evaluation.baselines.arrays import from_bytes

PARTS = 3
"""Byte strings of one set of groups: codes, zero points, scales."""


def quantize_groups(groups: torch.Tensor) -> list[bytes]:
    """float32 [..., size], one group along the last dimension -> `PARTS` byte strings."""
    codes, zero, scale = INT2.quantize(groups)
    return [to_bytes(pack(codes.flatten(), INT2.bits)), to_bytes(zero), to_bytes(scale)]


def dequantize_groups(parts: Sequence[memoryview], shape: Sequence[int]) -> torch.Tensor:
    """Inverse of `quantize_groups`: float32 of the given shape [..., size]."""
    codes, zero, scale = parts
    count, outer = math.prod(shape), shape[:-1]
    packed = from_bytes(codes, torch.uint8, (packed_size(count, INT2.bits),))
    return INT2.dequantize(
        unpack(packed, INT2.bits, count).view(*shape),
        from_bytes(zero, torch.float16, outer),
        from_bytes(scale, torch.float16, outer),
    )
