"""fp8: E4M3 codes around the middle of the group's range.

The paper charges fp8 groups for a shift and a scale like the integer types but
does not say how they are used. Here shift = (min + max) / 2 and
scale = (max - min) / 2 / 448, which centres the group so that E4M3's finest
steps and its full range are both used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtc_vllm.codec.quantizers.base import to_fp16

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Fp8Quantizer:
    """8-bit codes: the bit pattern of a float8_e4m3fn, never NaN."""

    name: str = "fp8"
    type_id: int = 3
    bits: int = 8

    def quantize(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        low, high = torch.aminmax(x, dim=-1)
        shift = to_fp16(low * 0.5 + high * 0.5)
        centre = shift.float()
        reach = torch.maximum(high - centre, centre - low)
        # As for the integer types, a constant group is its shift and nothing else.
        scale = to_fp16(torch.where(high > low, reach / E4M3_MAX, torch.zeros_like(reach)))
        step = scale.float().unsqueeze(-1)
        safe = torch.where(step > 0, step, torch.ones_like(step))
        y = ((x - centre.unsqueeze(-1)) / safe).clamp_(-E4M3_MAX, E4M3_MAX)
        y = torch.where(step > 0, y, torch.zeros_like(y))
        return y.to(torch.float8_e4m3fn).view(torch.uint8), shift, scale

    def dequantize(
        self, codes: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        y = codes.contiguous().view(torch.float8_e4m3fn).float()
        return y * scale.float().unsqueeze(-1) + shift.float().unsqueeze(-1)


FP8 = Fp8Quantizer()
