"""int2 and int4: asymmetric uniform quantiser, min/max per token and coefficient group.

The paper (section 3.2) takes KIVI's quantiser: shift = min,
scale = (max - min) / (2^b - 1), q = round((x - shift) / scale). Shift and
scale are rounded to float16 first and the rounded values are used for q, so
that rounding them adds no error of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtc_vllm.codec.quantizers.base import divisor, group_scale, to_fp16


@dataclass(frozen=True)
class UniformQuantizer:
    """`bits`-bit codes 0 .. 2**bits - 1."""

    name: str
    type_id: int
    bits: int

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        top = float(2**self.bits - 1)
        low, high = x.amin(dim=-1), x.amax(dim=-1)
        shift = to_fp16(low)
        centred_high = (high - shift.float()).clamp_min_(0.0)
        scale = group_scale(centred_high / top, low, high)
        codes = (x - shift.float().unsqueeze(-1)).div_(divisor(scale))
        return codes.round_().clamp_(0.0, top).to(torch.uint8), shift, scale

    def dequantize(
        self, codes: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        return codes.float().mul_(scale.float().unsqueeze(-1)).add_(shift.float().unsqueeze(-1))


INT2 = UniformQuantizer(name="int2", type_id=1, bits=2)
INT4 = UniformQuantizer(name="int4", type_id=2, bits=4)
