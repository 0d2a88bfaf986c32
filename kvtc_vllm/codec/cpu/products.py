"""Rows <-> coefficients of one section under one plan, as products of float32 or of int8.

On a CPU with VNNI or AMX instructions a product of int8 is four times as fast as one of float32.
Rows are rounded to 8 bits each by its own largest element, the basis column by column (for the
inverse row by row). That adds 3e-4 to 6e-4 of a row's energy to its error, which plans at high
target ratios hide. For those at lower ones `leading` keeps apart what has most of the energy.
Neither multiplies the zeros of a basis whose columns are of some layers alone (`blocks`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from kvtc_vllm.codec.cpu.blocks import blocks_of, by_blocks, taken
from kvtc_vllm.codec.cpu.rows import ZERO_POINT, Bytes, Floats, Integers, to_int8

INT8_ERROR = 0.008
LEADING_ERROR = 0.001
"""Least expected errors of plans for which int8 is exact enough: alone, beside leading columns."""
_INT8_MAX = 127
_MOST_VIEWS = 4
"""Runs of columns that are multiplied where they are, one after the other."""


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
    """rows @ matrix as torch computes it; matrix: float32 [m, n].

    elements: the dimension of it along which elements of rows of the cache lie.
    """

    def __init__(self, matrix: torch.Tensor, elements: int) -> None:
        self._rows, self._columns = matrix.shape
        self._blocks = blocks_of(matrix, elements)
        self._matrices = [block.of(matrix) for block in self._blocks]
        self._parts = [partial(_times, matrix=own) for own in self._matrices]

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self._matrices)

    def empty(self, tokens: int) -> Operand:
        return self.operand(np.empty((tokens, self._rows), np.float32))

    def operand(self, rows: Floats) -> Operand:
        return float_operand(rows)

    def of(self, operand: Operand) -> torch.Tensor:
        return by_blocks(self._blocks, self._parts, operand.rows, self._columns)


def _times(rows: Floats, runs: Integers, matrix: torch.Tensor) -> torch.Tensor:
    """Some columns of rows, those of the runs, times matrix."""
    if len(runs) > _MOST_VIEWS:
        return torch.from_numpy(taken(rows, runs)) @ matrix
    product = torch.zeros(len(rows), matrix.shape[1])
    at = 0
    for i, (first, length) in enumerate(runs.tolist()):
        view = torch.from_numpy(rows[:, first : first + length])
        product.addmm_(view, matrix[at : at + length], beta=1 if i else 0)
        at += length
    return product


class Int8Product:
    """rows @ matrix with both rounded to 8 bits.

    elements: see `Float32Product`. leading: so many first columns of rows are multiplied in
    float32.
    """

    def __init__(self, matrix: torch.Tensor, elements: int, leading: int = 0) -> None:
        self._leading = matrix[:leading].contiguous()
        rest = matrix[leading:]
        self._rows, self._columns = rest.shape
        self._blocks = blocks_of(rest, elements)
        self._codes = [_Codes(block.of(rest)) for block in self._blocks]
        self._parts = [codes.of for codes in self._codes]

    @property
    def nbytes(self) -> int:
        return self._leading.nbytes + sum(codes.nbytes for codes in self._codes)

    def empty(self, tokens: int) -> Operand:
        return Operand(
            np.empty((0, self._rows), np.float32),
            np.empty((tokens, len(self._leading)), np.float32),
            np.empty((tokens, self._rows), np.uint8),
            np.empty(tokens, np.float32),
        )

    def operand(self, rows: Floats) -> Operand:
        operand = self.empty(len(rows))
        leading = len(self._leading)
        to_int8(rows, leading, operand.codes, operand.factors)
        np.divide(rows[:, :leading], operand.factors[:, None], out=operand.leading)
        return operand

    def of(self, operand: Operand) -> torch.Tensor:
        product = by_blocks(self._blocks, self._parts, operand.codes, self._columns)
        if len(self._leading):
            product.addmm_(torch.from_numpy(operand.leading), self._leading)
        return product


class _Codes:
    """A matrix [m, n] as int8 with a step per column."""

    def __init__(self, matrix: torch.Tensor) -> None:
        steps = matrix.abs().amax(dim=0) / _INT8_MAX
        steps[steps == 0] = 1.0
        codes = (matrix / steps).round_().to(torch.int8).T.contiguous()
        self._steps = steps
        self._zeros = torch.zeros(len(steps), dtype=torch.int64)
        self._packed: Any = torch.ops.onednn.qlinear_prepack(codes, None)
        self.nbytes = codes.nbytes + steps.nbytes + self._zeros.nbytes

    def of(self, rows: Bytes, runs: Integers) -> torch.Tensor:
        """float32 [T, n]. rows: steps plus `ZERO_POINT`; runs: of their columns, m in all."""
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            torch.from_numpy(taken(rows, runs)),
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
        return product
