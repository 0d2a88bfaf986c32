"""A section under one plan as the fast path keeps it: its products both ways, and its payload."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from kvtc_vllm.codec.artifact import SectionBasis
from kvtc_vllm.codec.cpu.leading import BandedProduct, DeflatedProduct
from kvtc_vllm.codec.cpu.products import (
    Float32Product,
    Int8Product,
    Precision,
    Product,
    has_int8_products,
    precision_for,
)
from kvtc_vllm.codec.cpu.rows import Floats
from kvtc_vllm.codec.entropy import EntropyCoder
from kvtc_vllm.codec.section_coder import CodedSection, SectionCoder

LEAST_INT8_SIZE = 1 << 17
"""Elements of a matrix below which rounding rows takes what the product gains."""
COLUMNS_PER_LEADING = 64
"""Columns per one that stays float32 where rows are restored: the first are far larger."""
COLUMNS_PER_DEFLATED = 32
LEAST_DEFLATED = 8
"""The same where rows are projected, of plans whose error hides less; and how many there are at
least."""


class FastSection(ABC):
    """Coefficients <-> payload bit for bit as the plan's; rows <-> coefficients nearly so.

    columns: of the basis, those that anything is stored of. projected: those that `store` is given
    products with. int8: see `CpuCodec`. precision: of its products. beyond: of the coefficients
    that marked tokens alone have; it is made `of_marked` this section, whose rows it multiplies.
    Immutable: any number of threads may call it at once.
    """

    def __init__(
        self,
        section: SectionBasis,
        plan: SectionCoder,
        projected: list[int],
        columns: list[int],
        int8: bool | None,
        of_marked: FastSection | None = None,
    ) -> None:
        self.coder = plan
        self.beyond: FastSection | None = None
        self.mean = section.mean.to("cpu", torch.float32).contiguous().numpy()
        self.live = len(columns)
        self.sink_gain = plan.sink_gain
        size = section.basis.shape[0] * plan.rank
        use_int8 = has_int8_products() and size >= LEAST_INT8_SIZE if int8 is None else int8
        self.precision = precision_for(plan.expected_error) if use_int8 else Precision.FLOAT32
        basis = section.basis.to("cpu", torch.float32)
        deflated = max(LEAST_DEFLATED, self.live // COLUMNS_PER_DEFLATED)
        self.leading = basis[:, columns[:deflated]]
        if of_marked is not None:
            self.precision, self.leading = of_marked.precision, of_marked.leading
        weights = torch.empty(0) if section.weights is None else section.weights.to("cpu")
        # Rows are weighted before they are rounded: one step serves all elements of a row, and
        # would swallow the small ones that weigh most. The inverse has a step per element.
        self.weights = weights.numpy()
        self.forward = self._forward(basis[:, projected])
        inverse = basis[:, columns].T
        self.inverse = self._inverse(inverse / weights if len(weights) else inverse)

    @property
    def nbytes(self) -> int:
        """Memory that mean and matrices take, those of what marked tokens have beyond included."""
        own = self.mean.nbytes + self.weights.nbytes + self.forward.nbytes + self.inverse.nbytes
        return own if self.beyond is None else own + self.beyond.nbytes

    def store(self, product: torch.Tensor, factors: Floats, entropy: EntropyCoder) -> CodedSection:
        """Coefficients float32 [T, projected] times factors [T]; the former are overwritten.

        Raises CodecError as the plan's `encode` does.
        """
        streams = self.payload(product, factors)
        return CodedSection(entropy.coder_id, sum(map(len, streams)), entropy.encode(streams))

    @abstractmethod
    def payload(self, product: torch.Tensor, factors: Floats) -> list[bytes]:
        """The streams of `store`."""

    @abstractmethod
    def coefficients(self, payload: bytearray, out: Floats) -> None:
        """What a payload holds: out, float32 [T, live], zeros before.

        Raises ContainerError("bounds") as the plan's `decode` does.
        """

    def _forward(self, matrix: torch.Tensor) -> Product:
        if self.precision is Precision.FLOAT32 or matrix.numel() == 0:
            return Float32Product(matrix, elements=0)
        if self.precision is Precision.INT8:
            return Int8Product(matrix, elements=0)
        return DeflatedProduct(matrix, self.leading)

    def _inverse(self, matrix: torch.Tensor) -> Product:
        if self.precision is Precision.FLOAT32 or matrix.numel() == 0:
            return Float32Product(matrix, elements=1)
        leading = self.live // COLUMNS_PER_LEADING
        if self.precision is Precision.INT8:
            return Int8Product(matrix, 1, leading)
        return BandedProduct(matrix, leading)
