"""vLLM's fp8 KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtc_vllm.codec.quantizers.fp8 import E4M3_MAX
from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.evaluation.baselines.base import Baseline
from kvtc_vllm.evaluation.baselines.formats import from_bytes


class Fp8(Baseline):
    """`kv_cache_dtype="fp8"` of vLLM without calibrated scales.

    Followed: every element is rounded to E4M3 with scale 1; what lies beyond 448
    saturates (a cast of torch alone would give NaN there).
    Charged: 1 byte per element, hence 2x of a 16-bit cache. Nothing else is stored.
    Departures: attention of this bench reads the cache in its own dtype again, where
    vLLM may also compute attention in fp8.
    """

    name = "fp8-e4m3"
    source = "vLLM kv_cache_dtype=fp8 (E4M3), default scale 1"

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        return [
            to_bytes(x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)) for x in (k, v)
        ]

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.geometry
        outer = (tokens, g.num_layers, g.num_kv_heads)
        k = from_bytes(parts[0], torch.float8_e4m3fn, (*outer, g.head_size))
        v = from_bytes(parts[1], torch.float8_e4m3fn, (*outer, g.head_size_v))
        return k.to(self.dtype), v.to(self.dtype)
