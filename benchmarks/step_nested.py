"""An embedded form of codec 2's levels: every layer of codes cuts the bins of the one before.

A coefficient is known to lie in a bin. The first layer's bins are those of a step plan. A later
layer, for a finer plan, codes a coefficient whose bin is the zero bin as that plan would, and cuts
any other bin into as many equal parts as are nearest to the finer step; the symbol is the part. So
bins are nested, dead zones too, and the zero bin has at least three parts. Symbols are in streams
by what they are: native codes of the zero bin by width, with escapes as codec 2 has them, and parts
by their number. Decoded values are the means of what training rows put into the bins.

An experiment: it writes no blobs. Streams go through the codec's DEFLATE and are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from kvtc_vllm.codec.container import section_bytes
from kvtc_vllm.codec.entropy import UNIT_BYTES, EntropyCoder, aligned
from kvtc_vllm.codec.packing import pack
from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.codec.v2.codes import WIDE, WIDTHS
from kvtc_vllm.codec.v2.plan import StepPlan

BINS = 8
"""Bins of one generation and class that have a value of their own; larger ones share the last."""
FEW = 50
_PART_BITS = {2: 1, 3: 2, 4: 2}


@dataclass
class Cells:
    """What is known of the coefficients [r, T] of a section.

    x: the coefficients, those of marked tokens times their gain. low, high: bounds of magnitudes.
    value: what a decoder takes, signed. coded: in some layer so far; others are 0.
    """

    x: torch.Tensor
    low: torch.Tensor = field(init=False)
    high: torch.Tensor = field(init=False)
    value: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.low = torch.zeros_like(self.x)
        self.high = torch.full_like(self.x, torch.inf)
        self.value = torch.zeros_like(self.x)


@dataclass(frozen=True)
class Symbols:
    """Of one layer: codes int16 [r, T] of coefficients in the zero bin, parts of the others and how
    many there are; -1 and 1 where there are none."""

    codes: torch.Tensor
    part: torch.Tensor
    parts: torch.Tensor


def in_plan(plan: StepPlan, rank: int, marks: torch.Tensor) -> torch.Tensor:
    """Which coefficients [rank, T] a plan codes: those of all tokens, and of marked ones beyond."""
    column = torch.arange(rank)[:, None]
    return (column < plan.rank) | (marks & (column < plan.total_rank))


def classes_of(plan: StepPlan, rank: int) -> torch.Tensor:
    """Class of every column, int64 [rank]; those beyond come after the plan's own."""
    found = torch.zeros(rank, dtype=torch.int64)
    found[: plan.rank] = plan.classes.long()
    if plan.beyond is not None:
        found[plan.rank : plan.total_rank] = plan.beyond.classes.long() + len(plan.widths)
    return found


def refine(cells: Cells, plan: StepPlan, marks: torch.Tensor) -> Symbols:
    """One layer's symbols; the cells know them afterwards, but for their values."""
    rank = len(cells.x)
    coded = in_plan(plan, rank, marks)
    both = [plan] if plan.beyond is None else [plan, plan.beyond]
    rounding = torch.cat([own.rounding for own in both])[classes_of(plan, rank)]
    dead, offset = rounding.T[..., None]
    zero = coded & (cells.low == 0)
    size = cells.x.abs()
    scaled = size * plan.inverse_step
    level = torch.floor(scaled + offset)
    level[scaled < dead] = 0
    codes = (2 * level - (cells.x > 0).float()).clamp_min(0)
    codes = torch.where(zero, codes, -1.0).int()
    first = torch.maximum(dead, level - offset) * plan.step
    last = torch.minimum((level + 1 - offset) * plan.step, cells.high)
    # The bin of level 0 ends where that of level 1 begins.
    last = torch.where(level == 0, torch.minimum(dead * plan.step, cells.high), last)
    first = torch.where(level == 0, 0.0, first)
    other = coded & (cells.low > 0)
    width = cells.high - cells.low
    parts = torch.where(other, (width / plan.step).round().clamp(1, 4), 1.0)
    part = ((size - cells.low) / width * parts).floor().clamp(min=torch.zeros(()), max=parts - 1)
    part = torch.where(other, part, 0.0)
    low = cells.low + width / parts * part
    high = cells.low + width / parts * (part + 1)
    cells.low = torch.where(zero, first, torch.where(other, low, cells.low))
    cells.high = torch.where(zero, last, torch.where(other, high, cells.high))
    return Symbols(codes, part.to(torch.int8), parts.to(torch.int8))


@dataclass(frozen=True)
class Values:
    """Where in its bin a coefficient of some class and size lies on the average: float32
    [classes, BINS], 0 at the lower bound and 1 at the upper."""

    share: torch.Tensor

    @classmethod
    def fit(cls, cells: Cells, plan: StepPlan) -> Values:
        """To training rows."""
        rank = len(cells.x)
        place, known = _places(cells, plan)
        share = (cells.x.abs() - cells.low) / (cells.high - cells.low)
        classes = len(plan.widths) + (0 if plan.beyond is None else len(plan.beyond.widths))
        count = torch.bincount(place[known], minlength=classes * BINS).double()
        total = torch.bincount(place[known], share[known].double(), minlength=classes * BINS)
        found = torch.where(count >= FEW, total / count.clamp_min(1), 0.5)
        assert rank
        return cls(found.float().view(classes, BINS))

    def restore(self, cells: Cells, plan: StepPlan) -> torch.Tensor:
        """Values of all cells, float32 [r, T]; 0 in zero bins."""
        place, known = _places(cells, plan)
        share = self.share.flatten()[place]
        size = cells.low + share * (cells.high - cells.low)
        return torch.where(known, size * cells.x.sign(), 0.0)


def _places(cells: Cells, plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor]:
    known = (cells.low > 0) & cells.high.isfinite()
    number = (cells.low / plan.step).clamp(0, BINS - 1).long()
    return classes_of(plan, len(cells.x))[:, None] * BINS + number, known


def layer_bytes(
    symbols: Symbols,
    plan: StepPlan,
    marks: torch.Tensor,
    entropy: EntropyCoder,
    spans: Sequence[slice],
) -> int:
    """Bytes of one layer of one section in blobs of these tokens: units and entries included."""
    rank = len(symbols.codes)
    both = [plan.widths] if plan.beyond is None else [plan.widths, plan.beyond.widths]
    width = torch.cat(both)[classes_of(plan, rank)]
    taken = 0
    for span in spans:
        ends = [plan.rank, plan.total_rank] if bool(marks[span].any()) else [plan.rank]
        for first, end in zip([0, *ends], ends, strict=False):
            part = slice(first, end)
            own = Symbols(*(x[part, span] for x in vars(symbols).values()))
            encoded = entropy.encode([s for s in _streams(own, width[part]) if s])
            taken += section_bytes(UNIT_BYTES * len(encoded.units) + aligned(len(encoded.body)))
    return taken


def _streams(symbols: Symbols, widths: torch.Tensor) -> Iterator[bytes]:
    escapes, wide = [], []
    for width in WIDTHS:
        own = symbols.codes[widths == width]
        codes = own[own >= 0]
        escape = (1 << width) - 1
        yield to_bytes(pack(codes.clamp_max(escape).to(torch.uint8), width))
        beyond = codes[codes >= escape] - escape
        escapes.append(to_bytes(beyond.clamp_max(WIDE).to(torch.uint8)))
        wide.append(to_bytes((beyond[beyond >= WIDE] - WIDE).to(torch.int16).view(torch.uint8)))
    yield from escapes
    yield b"".join(wide)
    for parts, bits in _PART_BITS.items():
        own = symbols.part[symbols.parts == parts].to(torch.uint8)
        yield to_bytes(_pack_bits(own) if bits == 1 else pack(own, bits))


def _pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Eight in a byte, the first lowest: uint8 [n] -> uint8 [ceil(n / 8)]."""
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)
