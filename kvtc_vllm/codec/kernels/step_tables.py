"""Step plans as tables on the device, and the column order that their bases have there.

Columns lie in stored order: those whose codes are packed in 2 bits, in 4, in 8, each of these
*widths* filled up with zeros to a multiple of `COLUMNS`. So a tile of codes has one width. What
marked tokens have beyond a plan's columns is a section of its own, whose columns follow.

Sections are numbered as in the container: K and V of every layer group, or both as a pair, each
followed by what is beyond it if blobs have marks. Columns of all sections together are numbered,
too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.artifact import SectionKey
from kvtc_vllm.codec.entropy.unit_table import Lengths
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.kernels.batches import BasisShape, Batch
from kvtc_vllm.codec.kernels.resident import COLUMNS, ColumnOrder
from kvtc_vllm.codec.quantizers.base import FP16_MAX
from kvtc_vllm.codec.v2.codes import WIDTHS
from kvtc_vllm.codec.v2.plan import StepPlan

TOKENS = 8
"""Tokens of a tile that are worked on together. Few: on an H200, packing and unpacking a load took
twice as long with 32 as with 8, and longer still with more."""
_LEAST_STEP, _MOST_STEP = 2.0**-8, 1.0
"""Steps with which every level, and a level of a marked token, is a normal float16."""


@dataclass(frozen=True)
class StepColumns:
    """The resident order of the columns of one plan.

    counts: columns of each of `WIDTHS`. sources: int64, which of the plan's columns each resident
    one is, -1 for zeros.
    """

    counts: tuple[int, ...]
    sources: torch.Tensor

    @classmethod
    def of(cls, plan: StepPlan | None, width: int = 0) -> StepColumns:
        """width: columns to fill them up to with zeros, if they are fewer."""
        by_width = {} if plan is None else {part.width: part.columns for part in plan.packed}
        none = torch.empty(0, dtype=torch.int64)
        found = [by_width.get(width, none) for width in WIDTHS]
        parts = [torch.nn.functional.pad(own, (0, -len(own) % COLUMNS), value=-1) for own in found]
        sources = torch.cat(parts)
        more = max(width - len(sources), 0)
        sources = torch.nn.functional.pad(sources, (0, more), value=-1)
        return cls(tuple(map(len, found)), sources)

    @property
    def width(self) -> int:
        return len(self.sources)


def bytes_per_column(tokens: Lengths | int) -> Lengths:
    """Bytes of the packed codes of a column of each width: int64 [..., widths]."""
    bits: Lengths = np.asarray(tokens, np.int64)[..., None] * np.array(WIDTHS, np.int64)
    return -(-bits // 8)


def unit_of(plan: StepPlan) -> float:
    """See `ColumnOrder.unit`."""
    if _LEAST_STEP <= plan.step < _MOST_STEP:
        return 1.0
    _, exponent = math.frexp(plan.step)
    return math.ldexp(1.0, -exponent)


def basis_shape(plan: StepPlan, row: int, marks: bool) -> BasisShape:
    """Of a plan and, if blobs have marks, what is beyond it, as narrow as may be."""
    beyond = StepColumns.of(plan.beyond if marks else None)
    return BasisShape(row, StepColumns.of(plan).width, beyond.width)


def column_order(plan: StepPlan, shape: BasisShape, marks: bool) -> ColumnOrder:
    """Of a plan and, if blobs have marks, what is beyond it, filled up to a shape."""
    own = StepColumns.of(plan, shape.width)
    beyond = StepColumns.of(plan.beyond if marks else None, shape.beyond)
    moved = torch.where(beyond.sources < 0, -1, beyond.sources + plan.rank)
    return ColumnOrder(own.width, torch.cat((own.sources, moved)), unit_of(plan))


@dataclass(frozen=True)
class SectionTable:
    """One section."""

    plan: StepPlan | None
    columns: StepColumns


@dataclass(frozen=True)
class StepTables:
    """All sections of an artifact at one ratio, resident on a device."""

    sections: tuple[SectionTable, ...]
    all_coded: bool
    """Whether every section is of all coded tokens; else every second is of marked ones."""
    counts: torch.Tensor
    """int32 [S, 4]: columns of each width, first column among all."""
    targets: torch.Tensor
    """int32 [S, 5], where coefficients go: columns of the sections before it that are of as many
    tokens; columns of the keys before its own, what is beyond included; columns of its key, the
    same; columns of the section; and how many levels have a value of their own. Sections come in
    the order of `batches`."""
    own_columns: int
    """Of all sections of all coded tokens."""
    tiles: torch.Tensor
    """int32 [m, 4]: section, bits, first column in the section, and in the stored order of the
    width; beyond the end of that where there are only zeros. They cover all columns."""
    known: torch.Tensor
    """int32 [G], of every column: place in `values` of what level 1 stands for."""
    values: torch.Tensor
    """float32, of every section [C, M], in its resident unit."""
    numbers: torch.Tensor
    """float32 [S, 3]: step in the resident unit, its inverse, gain of marked tokens."""
    rounding: torch.Tensor
    """float32 [2, G]: dead zone and offset of every column."""

    @cached_property
    def num_columns(self) -> int:
        return len(self.known)

    @cached_property
    def columns(self) -> Lengths:
        """Of each width, int64 [S, widths]."""
        return np.array([section.columns.counts for section in self.sections], np.int64)

    @cached_property
    def has_plan(self) -> npt.NDArray[np.bool_]:
        """Of each section, [S]: without one it has no columns."""
        return np.array([section.plan is not None for section in self.sections])

    @classmethod
    def build(
        cls,
        plans: Mapping[SectionKey, StepPlan],
        batches: Sequence[Batch],
        marks: bool,
        operand: torch.dtype,
        device: torch.device,
    ) -> StepTables:
        """plans: in the order of the container. marks: whether blobs have them.

        Raises ArtifactError for values that the operand dtype can't hold.
        """
        sections: list[SectionTable] = []
        tiles: list[tuple[int, int, int, int]] = []
        counts: list[tuple[int, ...]] = []
        targets: list[tuple[int, ...]] = []
        known: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        numbers: list[torch.Tensor] = []
        rounding: list[torch.Tensor] = []
        first = placed = 0
        begins = _begins(batches)
        for key, plan in plans.items():
            begin, shape = begins[key]
            parts = (plan, plan.beyond) if marks else (plan,)
            earlier, widths = (begin.width, begin.beyond), (shape.width, shape.beyond)
            for own, before, width in zip(parts, earlier, widths, strict=False):
                order = StepColumns.of(own, width)
                column = 0
                for bits, count in zip(WIDTHS, order.counts, strict=True):
                    for index in range(0, count, COLUMNS):
                        tiles.append((len(sections), bits, column, index))
                        column += COLUMNS
                # Only zeros: beyond what is packed in the last of the widths.
                end = order.counts[-1] + COLUMNS
                tiles += [
                    (len(sections), WIDTHS[-1], more, end) for more in range(column, width, COLUMNS)
                ]
                counts.append((*order.counts, first))
                table, scalars = _values(own, operand)
                targets.append((before, begin.total, shape.total, width, table.shape[1]))
                classes = _classes(own, order)
                known.append(placed + table.shape[1] * classes)
                rounding.append(torch.zeros(width, 2) if own is None else own.rounding[classes])
                values.append(table.flatten())
                numbers.append(scalars)
                sections.append(SectionTable(own, order))
                placed += table.numel()
                first += width
        return cls(
            tuple(sections),
            not marks,
            torch.tensor(counts, dtype=torch.int32).to(device),
            torch.tensor(targets, dtype=torch.int32).to(device),
            sum(len(batch.keys) * batch.shape.width for batch in batches),
            torch.tensor(tiles, dtype=torch.int32).view(-1, 4).to(device),
            torch.cat(known).int().to(device),
            torch.cat(values).to(device),
            torch.stack(numbers).to(device),
            torch.cat(rounding).float().T.contiguous().to(device),
        )


def _begins(batches: Sequence[Batch]) -> dict[SectionKey, tuple[BasisShape, BasisShape]]:
    """Of every section: columns of those before it, and its own."""
    found: dict[SectionKey, tuple[BasisShape, BasisShape]] = {}
    width = beyond = 0
    for batch in batches:
        for key in batch.keys:
            found[key] = BasisShape(0, width, beyond), batch.shape
            width, beyond = width + batch.shape.width, beyond + batch.shape.beyond
    return found


def _classes(plan: StepPlan | None, columns: StepColumns) -> torch.Tensor:
    """int64 [width]; 0 where there are zeros."""
    if plan is None or not plan.rank:
        return torch.zeros(columns.width, dtype=torch.int64)
    return torch.where(columns.sources < 0, 0, plan.classes.long()[columns.sources.clamp_min(0)])


def _values(plan: StepPlan | None, operand: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    if plan is None:
        return torch.zeros(1, 1), torch.ones(3)
    unit = unit_of(plan)
    values = plan.values * unit
    if operand == torch.float16 and not float(values.max()) <= FP16_MAX:
        raise ArtifactError(
            f"a level stands for {float(plan.values.max()):g} at a step of {plan.step:g}; float16 "
            f"products hold {FP16_MAX / unit:g}"
        )
    numbers = torch.tensor([plan.step * unit, plan.inverse_step / unit, plan.sink_gain])
    return values.contiguous(), numbers.float()
