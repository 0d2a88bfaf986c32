"""A section under one plan as the fast path keeps it: its products both ways, and its payload."""

from __future__ import annotations

import math

import numpy as np
import torch

from kvtc_vllm.codec.artifact import SectionBasis
from kvtc_vllm.codec.cpu.bits import float_of
from kvtc_vllm.codec.cpu.coding import decode_groups, encode_groups
from kvtc_vllm.codec.cpu.products import (
    Float32Product,
    Int8Product,
    Product,
    has_int8_products,
    terms_for,
)
from kvtc_vllm.codec.cpu.rows import Floats, largest_bits, scale_rows
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.payload import batches, bit_plan, payload_length, stream_lengths
from kvtc_vllm.codec.quantizers.base import FP16_MAX
from kvtc_vllm.codec.quantizers.fp8 import E4M3_VALUES

LEAST_INT8_SIZE = 1 << 17
"""Elements of a matrix below which rounding rows takes what the product gains."""
COLUMNS_PER_LEADING = 64
"""Columns per one that stays float32 where rows are restored: the first are far larger."""
_E4M3 = E4M3_VALUES.numpy()


class FastSection:
    """Coefficients <-> payload bit for bit as `BitPlan`'s; rows <-> coefficients nearly so.

    int8: see `CpuKvtcCodec`. terms: of the int8 products, 0 for products of float32. Immutable:
    any number of threads may call it at once.
    """

    def __init__(self, section: SectionBasis, ratio: float, int8: bool | None) -> None:
        self.plan = bit_plan(section, ratio)
        self.mean = section.mean.to("cpu", torch.float32).contiguous().numpy()
        size = section.basis.shape[0] * self.plan.rank
        use_int8 = has_int8_products() and size >= LEAST_INT8_SIZE if int8 is None else int8
        self.terms = terms_for(self.plan.expected_error) if use_int8 else 0
        stored = [
            (start, batch.size, batch.quantizer.bits)
            for batch in batches(self.plan)
            for start in batch.starts
        ]
        self._groups = np.array(stored, np.int64).reshape(-1, 3)
        columns = [c for g in self.plan.groups for c in range(g.start, g.start + g.size)]
        self._live_groups = self._groups.copy()
        self._live_groups[:, 0] = np.searchsorted(np.array(columns, np.int64), self._groups[:, 0])
        self.live = len(columns)
        basis = section.basis[:, : self.plan.rank].to("cpu", torch.float32)
        weights = torch.empty(0) if section.weights is None else section.weights.to("cpu")
        # Rows are weighted before they are rounded: one step serves all elements of a row, and
        # would swallow the small ones that weigh most. The inverse has a step per element.
        self.weights = weights.numpy()
        self.forward = self._product(basis, 0)
        inverse = basis[:, columns].T
        if len(weights):
            inverse = inverse / weights
        leading = self.live // COLUMNS_PER_LEADING
        self.inverse = self._product(inverse, leading)

    @property
    def nbytes(self) -> int:
        """Memory that mean and matrices take."""
        return self.mean.nbytes + self.weights.nbytes + self.forward.nbytes + self.inverse.nbytes

    def payload(self, product: torch.Tensor, factors: Floats) -> list[bytes]:
        """Streams of coefficients float32 [T, rank] times factors [T]; the former are overwritten.

        Raises CodecError("range") as `BitPlan.encode` does.
        """
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
        """Inverse of `payload` without columns that nothing is stored of: out, [T, live].

        Raises ContainerError("bounds") as `BitPlan.decode` does.
        """
        if not payload:
            return
        decode_groups(np.frombuffer(payload, np.uint8), self._live_groups, _E4M3, out)
        if not float_of(largest_bits(out.reshape(-1).view(np.uint32))) < math.inf:
            raise ContainerError("bounds", "a decoded coefficient is not finite")

    def _product(self, matrix: torch.Tensor, leading: int) -> Product:
        if not self.terms or matrix.numel() == 0:
            return Float32Product(matrix)
        return Int8Product(matrix, self.terms, leading)
