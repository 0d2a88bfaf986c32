"""int2 and int4: asymmetric uniform quantiser, min/max a token and group.

The paper (section 3.2) takes KIVI's quantiser: shift = min,
scale = (max - min) / (2^b - 1), q = round((x - shift) / scale). Shift and
scale are rounded to float16 first and the rounded values are used for q, so
that rounding them adds no error of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtc_vllm.codec.quantizers.base import to_fp16


@dataclass(frozen=True)
class UniformQuantizer:
    """`bits`-bit codes 0 .. 2**bits - 1."""

    name: str
    type_id: int
    bits: int

    def quantize(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        top = float(2**self.bits - 1)
        low, high = torch.aminmax(x, dim=-1)
        shift = to_fp16(low)
        reach = ((high - shift.float()) / top).clamp_min(0.0)
        # A constant group (every group of one element) is its shift: spending a scale on the
        # rounding error of the shift would cost DEFLATE 16 bits of noise a token.
        scale = to_fp16(torch.where(high > low, reach, torch.zeros_like(reach)))
        step = scale.float().unsqueeze(-1)
        # A zero scale (constant group, or a range below float16) leaves every code 0.
        safe = torch.where(step > 0, step, torch.ones_like(step))
        codes = torch.round((x - shift.float().unsqueeze(-1)) / safe).clamp_(0.0, top)
        codes = torch.where(step > 0, codes, torch.zeros_like(codes))
        return codes.to(torch.uint8), shift, scale

    def dequantize(
        self, codes: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        return codes.float() * scale.float().unsqueeze(-1) + shift.float().unsqueeze(-1)


INT2 = UniformQuantizer(name="int2", type_id=1, bits=2)
INT4 = UniformQuantizer(name="int4", type_id=2, bits=4)
