"""The quantiser interface: one coefficient group of one token at a time, vectorised.

Integer codes are a contract: every kernel must reproduce them bit for bit from
the same float32 coefficients, so each step (subtract, divide, round half to
even) is a single IEEE float32 operation.
"""

from __future__ import annotations

from typing import Protocol

import torch

FP16_MAX = 65504.0
SHIFT_SCALE_BITS = 32
"""Bits of the scales per coefficient group and token: float16 shift + scale (paper, 3.2)."""


class Quantizer(Protocol):
    """A type of the allocation's alphabet.

    name: key in the registry and in stored plans. type_id: its number in the
    file format, never reused. bits: payload bits per element.
    """

    @property
    def name(self) -> str: ...

    @property
    def type_id(self) -> int: ...

    @property
    def bits(self) -> int: ...

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantise groups along the last dimension.

        x: float32 [..., size]. Returns (codes uint8 [..., size] below
        2**bits, shift float16 [...], scale float16 [...]).
        """
        ...

    def dequantize(
        self, codes: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Inverse of `quantize`: float32 [..., size]."""
        ...


def group_cost_bits(bits: int, size: int) -> int:
    """Bits per token that one stored coefficient group costs: payload + shift + scale."""
    return bits * size + SHIFT_SCALE_BITS


def to_fp16(x: torch.Tensor) -> torch.Tensor:
    """Round to float16, saturating instead of overflowing to infinity."""
    return x.clamp(-FP16_MAX, FP16_MAX).to(torch.float16)


def group_scale(step: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The stored scale of groups with the given step and range: float16, shape of `step`.

    Zero for a constant group, hence for every group of one element: it is its
    shift. Spending a scale on the rounding error of the shift would cost
    DEFLATE 16 bits of noise per token.
    """
    return to_fp16(step * (high > low))


def divisor(scale: torch.Tensor) -> torch.Tensor:
    """What to divide by for a stored scale: float32 [..., 1], infinite where scale is zero.

    Dividing by infinity gives code 0 for every element of such a group.
    """
    step = scale.float()
    return step.masked_fill_(step == 0, torch.inf).unsqueeze(-1)
