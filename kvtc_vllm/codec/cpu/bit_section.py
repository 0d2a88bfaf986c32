"""The payload of a bit plan by compiled loops. Imports numba."""

from __future__ import annotations

import math

import numpy as np
import torch

from kvtc_vllm.codec.artifact import SectionBasis
from kvtc_vllm.codec.cpu.bits import float_of
from kvtc_vllm.codec.cpu.coding import decode_groups, encode_groups
from kvtc_vllm.codec.cpu.rows import Floats, largest_bits, scale_rows
from kvtc_vllm.codec.cpu.section import FastSection
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.payload import batches, bit_plan, payload_length, stream_lengths
from kvtc_vllm.codec.quantizers.base import FP16_MAX
from kvtc_vllm.codec.quantizers.fp8 import E4M3_VALUES

_E4M3 = E4M3_VALUES.numpy()


class BitSection(FastSection):
    """`BitPlan`'s."""

    def __init__(self, section: SectionBasis, ratio: float, int8: bool | None) -> None:
        self.plan = bit_plan(section, ratio)
        stored = [
            (start, batch.size, batch.quantizer.bits)
            for batch in batches(self.plan)
            for start in batch.starts
        ]
        self._groups = np.array(stored, np.int64).reshape(-1, 3)
        columns = [c for g in self.plan.groups for c in range(g.start, g.start + g.size)]
        self._live_groups = self._groups.copy()
        self._live_groups[:, 0] = np.searchsorted(np.array(columns, np.int64), self._groups[:, 0])
        super().__init__(section, self.plan, list(range(self.plan.rank)), columns, int8)

    def payload(self, product: torch.Tensor, factors: Floats) -> list[bytes]:
        coefficients = product.numpy()
        if not float_of(scale_rows(coefficients, factors)) <= FP16_MAX:
            raise CodecError("range", "a coefficient is outside the float16 range")
        tokens = len(coefficients)
        payload = np.zeros(payload_length(self.plan, tokens), np.uint8)
        encode_groups(coefficients, self._groups, payload)
        ends = np.cumsum(stream_lengths(self.plan, tokens)).tolist()
        starts = [0, *ends[:-1]]
        return [payload[a:b].tobytes() for a, b in zip(starts, ends, strict=True)]

    def coefficients(self, payload: bytearray, out: Floats) -> None:
        if not payload:
            return
        decode_groups(np.frombuffer(payload, np.uint8), self._live_groups, _E4M3, out)
        if not float_of(largest_bits(out.reshape(-1).view(np.uint32))) < math.inf:
            raise ContainerError("bounds", "a decoded coefficient is not finite")
