"""int8 products for plans of small error: what has most of a row's energy is kept apart.

A step of int8 is a 127th of the largest number that it must reach. The first of thousands of
columns have most of a row's energy, so without them steps are several times smaller.
"""

from __future__ import annotations

import numpy as np
import torch

from kvtc_vllm.codec.cpu.products import Int8Product, Operand, float_operand
from kvtc_vllm.codec.cpu.rows import Floats

BAND = 8
"""End of the first band, in leading columns."""


class DeflatedProduct:
    """rows @ matrix as leading part + rest of the rows, of which only the rest is rounded.

    matrix: float32 [m, n]. leading: float32 [m, l], the columns that rows are freed of, about
    orthonormal; how far they are from it costs precision, not correctness.
    """

    def __init__(self, matrix: torch.Tensor, leading: torch.Tensor) -> None:
        self._leading = leading.contiguous()
        self._of_leading = leading.T @ matrix
        self._rest = Int8Product(matrix, elements=0)

    @property
    def nbytes(self) -> int:
        return self._leading.nbytes + self._of_leading.nbytes + self._rest.nbytes

    def empty(self, tokens: int) -> Operand:
        return float_operand(np.empty((tokens, len(self._leading)), np.float32))

    def operand(self, rows: Floats) -> Operand:
        return float_operand(rows)

    def of(self, operand: Operand) -> torch.Tensor:
        rows = torch.from_numpy(operand.rows)
        found = rows @ self._leading
        rest = self._rest.operand(torch.addmm(rows, found, self._leading.T, alpha=-1).numpy())
        product = self._rest.of(rest).mul_(torch.from_numpy(rest.factors)[:, None])
        return product.addmm_(found, self._of_leading)


class BandedProduct:
    """rows @ matrix in two bands of columns, each rounded by its own largest elements.

    matrix: float32 [m, n]. leading: so many first columns of rows are multiplied in float32.
    Columns come by falling size.
    """

    def __init__(self, matrix: torch.Tensor, leading: int) -> None:
        self._cut = min(BAND * leading, len(matrix))
        bands = (matrix[: self._cut], leading), (matrix[self._cut :], 0)
        self._bands = [Int8Product(own, 1, columns) for own, columns in bands if len(own)]
        self._rows = len(matrix)

    @property
    def nbytes(self) -> int:
        return sum(band.nbytes for band in self._bands)

    def empty(self, tokens: int) -> Operand:
        return float_operand(np.empty((tokens, self._rows), np.float32))

    def operand(self, rows: Floats) -> Operand:
        return float_operand(rows)

    def of(self, operand: Operand) -> torch.Tensor:
        rows = operand.rows
        parts = (np.ascontiguousarray(x) for x in (rows[:, : self._cut], rows[:, self._cut :]))
        operands = [
            band.operand(x)
            for band, x in zip(self._bands, (x for x in parts if x.shape[1]), strict=True)
        ]
        last = self._bands[-1].of(operands[-1])
        last.mul_(torch.from_numpy(operands[-1].factors)[:, None])
        if len(operands) == 1:
            return last
        factors = torch.from_numpy(operands[0].factors)[:, None]
        return last.addcmul_(self._bands[0].of(operands[0]), factors)
