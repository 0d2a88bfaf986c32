"""QuantSpec: 8-bit codes in two levels of four bits, of which the upper can be read alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from kvtc_vllm.codec.packing import pack, packed_size, unpack
from kvtc_vllm.codec.quantizers.uniform import INT4
from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.evaluation.baselines.base import Baseline
from kvtc_vllm.evaluation.baselines.formats import from_bytes, to_cache

GROUP = 128
"""Tokens of a channel's keys that share a scale; values of a token share one per head."""
_BITS = 4
_HALF = 1 << (_BITS - 1)


class QuantSpec(Baseline):
    """QuantSpec's cache (arXiv 2502.10424) as an offload codec.

    Followed: post-RoPE keys are quantised per channel along the tokens, values per token along
    the channels of a head. The upper level is 4 bits, asymmetric between minimum and maximum. The
    lower level is 4 bits, symmetric, of what the upper leaves, with 1/16 of its scale and no
    parameters of its own. Both together are what the target model reads, the upper alone what
    the draft reads.
    Charged: 4 or 8 bits per element, and a float16 zero point and scale per group.
    Departures: the paper's group is as long as its heads, 128; here keys have groups of 128 tokens
    (the last one of a chunk may be shorter, where the paper keeps a buffer in full precision), and
    values groups of the model's own head. Parameters are rounded to float16 before codes are
    computed, which favours the method.
    """

    source = "QuantSpec, arXiv 2502.10424: hierarchical INT4 levels, keys per channel, group 128"
    levels: ClassVar[int]

    def prepare(self) -> None:
        self._parts = self.levels + 2

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        parts: list[bytes] = []
        for keys in k.split(GROUP):
            parts += self._compress(keys.float().movedim(0, -1).contiguous())
        return [*parts, *self._compress(v.float())]

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.geometry
        layer = (g.num_layers, g.num_kv_heads)
        keys = []
        for number, first in enumerate(range(0, tokens, GROUP)):
            own = parts[number * self._parts : (number + 1) * self._parts]
            group = min(GROUP, tokens - first)
            keys.append(self._restore(own, (*layer, g.head_size, group)).movedim(-1, 0))
        values = self._restore(parts[-self._parts :], (tokens, *layer, g.head_size_v))
        return to_cache(torch.cat(keys), self.dtype), to_cache(values, self.dtype)

    def _compress(self, x: torch.Tensor) -> list[bytes]:
        """float32 [..., size], one group along the last dimension -> codes by level, parameters."""
        upper, zero, scale = INT4.quantize(x)
        codes = [upper]
        if self.levels == 2:
            left = x - INT4.dequantize(upper, zero, scale)
            codes.append(_lower_codes(left, scale))
        packed = [to_bytes(pack(code.flatten(), _BITS)) for code in codes]
        return [*packed, to_bytes(zero), to_bytes(scale)]

    def _restore(self, parts: Sequence[memoryview], shape: tuple[int, ...]) -> torch.Tensor:
        """Inverse of `_compress`: float32 of the given shape."""
        *codes, zero, scale = parts
        outer = shape[:-1]
        count = int(torch.Size(shape).numel())
        upper, *lower = [
            unpack(
                from_bytes(code, torch.uint8, (packed_size(count, _BITS),)), _BITS, count
            ).reshape(shape)
            for code in codes
        ]
        step = from_bytes(scale, torch.float16, outer)
        x = INT4.dequantize(upper, from_bytes(zero, torch.float16, outer), step)
        for code in lower:
            x += (code.float() - _HALF) * (step.float() / (1 << _BITS)).unsqueeze(-1)
        return x


class QuantSpec8(QuantSpec):
    """Both levels."""

    name = "quantspec-8bit"
    levels = 2


class QuantSpec4(QuantSpec):
    """The upper level alone."""

    name = "quantspec-4bit"
    levels = 1


def _lower_codes(left: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What the upper level leaves in 1/16 of its steps, -8 to 7, as uint8 from 0."""
    step = (scale.float() / (1 << _BITS)).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (left / step.unsqueeze(-1)).round_().clamp_(-_HALF, _HALF - 1)
    return (codes + _HALF).to(torch.uint8)
