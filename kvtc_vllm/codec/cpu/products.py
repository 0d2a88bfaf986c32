"""Rows <-> coefficients of one section under one plan, as products of float32 or of int8.

On a CPU with VNNI or AMX instructions a product of int8 is four times as fast as one of float32.
Rows are rounded to 8 bits each by its own largest element, the basis column by column (for the
inverse row by row). That adds 3e-4 to 6e-4 of a row's energy to its error, which plans at high
target ratios hide. For those at lower ones `leading` keeps apart what has most of the energy.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch

from kvtc_vllm.codec.cpu.rows import ZERO_POINT, Bytes, Floats, Integers, to_int8

INT8_ERROR = 0.008
LEADING_ERROR = 0.001
"""Least expected errors of plans for which int8 is exact enough: alone, beside leading columns."""
_INT8_MAX = 127


class Precision(Enum):
    """Of the products of a section, in words."""

    FLOAT32 = "float32"
    LEADING = "int8 beside leading columns"
    INT8 = "int8"


def precision_for(expected_error: float) -> Precision:
    """The fastest whose rounding adds about 5 % to a plan's error at most."""
    if expected_error >= INT8_ERROR:
        return Precision.INT8
    return Precision.LEADING if expected_error >= LEADING_ERROR else Precision.FLOAT32


def has_int8_products() -> bool:
    """Whether this CPU has instructions that multiply int8 without saturating in between."""
    instructions = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    onednn: Any = torch.backends.mkldnn
    return bool(instructions and onednn.is_available())


@dataclass(frozen=True)
class Operand:
    """Rows to be multiplied: float32 `rows` [T, m], or if they are [0, m], the rest.

    leading: float32 [T, l], the first columns in units of `factors`. codes: the others, uint8
    [T, m - l]. factors: float32 [T], to be multiplied into the rows of a product.
    """

    rows: Floats
    leading: Floats
    codes: Bytes
    factors: Floats

    def part(self, rows: slice | Integers) -> Operand:
        """Some rows: views of a slice, copies of those with given numbers."""
        own = self.rows[rows] if len(self.rows) else self.rows
        return Operand(own, self.leading[rows], self.codes[rows], self.factors[rows])


def float_operand(rows: Floats) -> Operand:
    """Of float32 [T, m], as it is."""
    tokens = len(rows)
    codes = np.empty((tokens, 0), np.uint8)
    return Operand(rows, np.empty((tokens, 0), np.float32), codes, np.ones(tokens, np.float32))


class Product(Protocol):
    """One matrix. Immutable: any number of threads may call it at once."""

    @property
    def nbytes(self) -> int:
        """Memory that it keeps."""
        ...

    def empty(self, tokens: int) -> Operand:
        """Room for so many rows."""
        ...

    def operand(self, rows: Floats) -> Operand:
        """Of float32 [T, m]."""
        ...

    def of(self, operand: Operand) -> torch.Tensor:
        """float32 [T, n], without the operand's factors."""
        ...


class Float32Product:
    """rows @ matrix as torch computes it; matrix: float32 [m, n]."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = matrix.contiguous()

    @property
    def nbytes(self) -> int:
        return self._matrix.nbytes

    def empty(self, tokens: int) -> Operand:
        return self.operand(np.empty((tokens, len(self._matrix)), np.float32))

    def operand(self, rows: Floats) -> Operand:
        return float_operand(rows)

    def of(self, operand: Operand) -> torch.Tensor:
        return torch.from_numpy(operand.rows) @ self._matrix


class Int8Product:
    """rows @ matrix with both rounded to 8 bits.

    leading: so many first columns of rows are multiplied in float32.
    """

    def __init__(self, matrix: torch.Tensor, leading: int = 0) -> None:
        self._leading = matrix[:leading].contiguous()
        rest = matrix[leading:]
        steps = rest.abs().amax(dim=0) / _INT8_MAX
        steps[steps == 0] = 1.0
        codes = (rest / steps).round_().to(torch.int8).T.contiguous()
        self._columns = codes.shape[1]
        self._steps = steps
        self._zeros = torch.zeros(len(steps), dtype=torch.int64)
        self._packed: Any = torch.ops.onednn.qlinear_prepack(codes, None)
        self._bytes = codes.nbytes

    @property
    def nbytes(self) -> int:
        return self._bytes + self._leading.nbytes + self._steps.nbytes + self._zeros.nbytes

    def empty(self, tokens: int) -> Operand:
        return Operand(
            np.empty((0, self._columns), np.float32),
            np.empty((tokens, len(self._leading)), np.float32),
            np.empty((tokens, self._columns), np.uint8),
            np.empty(tokens, np.float32),
        )

    def operand(self, rows: Floats) -> Operand:
        operand = self.empty(len(rows))
        leading = len(self._leading)
        to_int8(rows, leading, operand.codes, operand.factors)
        np.divide(rows[:, :leading], operand.factors[:, None], out=operand.leading)
        return operand

    def of(self, operand: Operand) -> torch.Tensor:
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            torch.from_numpy(operand.codes),
            1.0,
            ZERO_POINT,
            self._packed,
            self._steps,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        if len(self._leading):
            product.addmm_(torch.from_numpy(operand.leading), self._leading)
        return product
