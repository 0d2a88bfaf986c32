"""One section's plan for a given step: classes, rounding, values, widths, and how many columns.

Coefficients are classed by their deviation in steps, a quarter of an octave each. The rounding of a
class weighs error against bits: level k is taken instead of k - 1 where the squared error saved,
in steps, is worth `PRICE_OF_A_BIT` times the bits that it costs more (rate-distortion optimised
quantisation; at high rate a bit saves 2 ln 2 / 12 of a squared step). So is the number of columns:
a column that costs more than it saves is not coded, and every coded one costs time in two products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.v2.codes import WIDTHS
from kvtc_vllm.codec.v2.nesting import halved_offsets
from kvtc_vllm.codec.v2.plan import StepPlan

PRICE_OF_A_BIT = math.log(2) / 6
LEAST_SINKS = 8
"""Marked tokens of a sample, below which nothing is fitted to them."""
LEVELS = 15
"""Levels of a class that have a value of their own."""
LEAST_DEVIATION = 0.08
"""Columns of a smaller deviation, in steps, are never worth their bits."""
CLASSES_PER_OCTAVE = 4
_BINS_PER_STEP = 32
_ROUNDS = 4
_FEW = 50
"""Coefficients of a level below which its value is not taken from them."""
_PLAIN_DEAD_ZONE = 0.6
_PLAIN_OFFSET = 0.4
_DEAD_ZONE = (0.5, 1.5)
_OFFSET = (0.2, 0.5)

Table = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepSettings:
    """sink_gain: marked tokens are quantised by so many times finer steps. column_bits: bits per
    token that a coded column must save beside its own, for the time that products take.
    beyond_bits: the same per marked token, of columns that only these have, for the room that they
    take in the artifact. halvings: how many plans are nested in every ratio's, each in the one
    before. nested: ratios to call these by, in their order; none: those that they have."""

    sink_gain: float = 4.0
    column_bits: float = 1.0
    beyond_bits: float = 0.0
    halvings: int = 0
    nested: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sample:
    """coefficients: float32 [n, r], columns by falling variance. outside: summed squares of what
    the same rows have outside these columns. row_size: elements of a row."""

    coefficients: torch.Tensor
    outside: float
    row_size: int


def make_step_plan(
    sample: Sample,
    marks: torch.Tensor,
    step: float,
    settings: StepSettings,
    fine: StepPlan | None = None,
) -> StepPlan:
    """The plan with the fewest columns that are worth their bits; its bytes are not known yet.

    marks: bool [n], the sinks. The plan's classes and columns are those of the other tokens, its
    `beyond` has the columns that sinks need besides. fine: a plan of half the step, in which this
    one is to be nested.
    """
    coefficients = sample.coefficients
    offsets = None if fine is None else halved_offsets(fine)
    plan = _plan_of(coefficients[~marks], sample, step, settings, offsets)
    if int(marks.sum()) < LEAST_SINKS:
        return plan
    sinks = coefficients[marks, plan.rank :] * settings.sink_gain
    own = replace(settings, column_bits=settings.beyond_bits)
    offsets = None if offsets is None else offsets[plan.rank :]
    beyond = _plan_of(sinks, Sample(sinks, 0.0, sample.row_size), step, own, offsets)
    beyond = replace(beyond, expected_error=plan.expected_error)
    return replace(plan, beyond=beyond) if beyond.rank else plan


def _plan_of(
    ordinary: torch.Tensor,
    sample: Sample,
    step: float,
    settings: StepSettings,
    offsets: torch.Tensor | None,
) -> StepPlan:
    """From coefficients [n, r] of tokens that count; the sample is for the expected error.

    offsets: float32, with which the leading columns are rounded, and no other is coded; None: those
    that pay.
    """
    deviation = ordinary.square().mean(0).sqrt() / step
    large = (deviation >= LEAST_DEVIATION).nonzero()
    shown = int(large[-1]) + 1 if len(large) else 0
    if offsets is not None:
        shown = min(shown, len(offsets))
    ordinary, deviation = ordinary[:, :shown], deviation[:shown]
    octaves = (CLASSES_PER_OCTAVE * deviation.clamp_min(LEAST_DEVIATION).log2()).round()
    # A class is rounded in one way.
    alike = torch.stack((octaves, torch.zeros(shown) if offsets is None else offsets[:shown]))
    used, classes = alike.unique(dim=1, return_inverse=True)
    count = max(1, used.shape[1])
    rounding = None
    if offsets is not None and shown:
        rounding = np.stack((np.zeros(count), used[1].double().numpy()), axis=1)
    tables = _Tables(_histogram(ordinary.abs() / step, classes, count), rounding)
    plan = StepPlan(
        step=step,
        classes=classes.to(torch.uint8),
        widths=tables.widths(),
        values=torch.from_numpy(tables.values * step).float(),
        rounding=torch.from_numpy(tables.rounding).float(),
        sink_gain=settings.sink_gain,
        token_bytes=math.inf,
        expected_error=math.nan,
    )
    return _trimmed(plan, ordinary, tables, sample, settings)


def _trimmed(
    plan: StepPlan, ordinary: torch.Tensor, tables: _Tables, sample: Sample, settings: StepSettings
) -> StepPlan:
    """Without the last columns, as many as are not worth their bits."""
    codes = plan.quantise(ordinary)
    left = (ordinary - plan.restore(codes)).square().mean(0).double()
    saved = (ordinary.square().mean(0).double() - left) / plan.step**2
    levels = ((codes + 1) >> 1).clamp_max(LEVELS + 1).long()
    bits = torch.from_numpy(tables.bits)[plan.classes.long()].gather(1, levels).mean(1)
    worth = (saved - PRICE_OF_A_BIT * (bits + settings.column_bits)).cumsum(0)
    rank = int(worth.argmax()) + 1 if len(worth) and float(worth.max()) > 0 else 0
    energy = sample.coefficients.double().square()
    total = float(energy.sum()) + sample.outside
    dropped = float(energy[:, rank:].sum()) + sample.outside
    # As if sinks, which are few, were like other tokens.
    inside = float(left[:rank].sum()) * len(sample.coefficients)
    used, classes = plan.classes[:rank].long().unique(return_inverse=True)
    kept = used if rank else torch.zeros(1, dtype=torch.int64)
    return StepPlan(
        step=plan.step,
        classes=classes.to(torch.uint8),
        widths=plan.widths[kept],
        values=plan.values[kept],
        rounding=plan.rounding[kept],
        sink_gain=plan.sink_gain,
        token_bytes=plan.token_bytes,
        expected_error=(dropped + inside) / total if total > 0 else 0.0,
    )


def _histogram(scaled: torch.Tensor, classes: torch.Tensor, count: int) -> Table:
    """Of magnitudes in steps, per class: [count, bins]; the last bin has all larger ones."""
    bins = (LEVELS + 1) * _BINS_PER_STEP + 1
    places = (scaled * _BINS_PER_STEP).long().clamp_max_(bins - 1)
    places += classes * bins
    found = torch.bincount(places.flatten(), minlength=count * bins)
    return found.view(count, bins).double().numpy()


class _Tables:
    """Rounding, bits and values of classes, from their histograms.

    rounding: [C, 2]. bits: [C, LEVELS + 2], sign included; the last is of all larger levels.
    values: [C, LEVELS], in steps.
    """

    def __init__(self, histogram: Table, rounding: Table | None = None) -> None:
        """rounding: given; None: found by price."""
        self._histogram = histogram
        count, bins = histogram.shape
        self._centres = (np.arange(bins) + 0.5) / _BINS_PER_STEP
        plain = np.tile([_PLAIN_DEAD_ZONE, _PLAIN_OFFSET], (count, 1))
        self.rounding = plain if rounding is None else rounding
        self._count()
        for _ in range(_ROUNDS if rounding is None else 0):
            self._round_by_price()
            self._count()

    def _count(self) -> None:
        dead, offset = self.rounding.T[..., None]
        levels = np.floor(self._centres + offset).astype(np.int64)
        levels[self._centres < dead] = 0
        levels = np.minimum(levels, LEVELS + 1)
        count = len(levels)
        places = levels + np.arange(count)[:, None] * (LEVELS + 2)
        sizes = [self._histogram, self._histogram * self._centres]
        number, total = (
            np.bincount(places.ravel(), x.ravel(), count * (LEVELS + 2)).reshape(count, -1)
            for x in sizes
        )
        self.counts = number
        probability = (number + 0.5) / (number + 0.5).sum(1, keepdims=True)
        self.bits = -np.log2(probability)
        self.bits[:, 1:] += 1
        own = np.tile(np.arange(1.0, LEVELS + 1), (count, 1))
        enough = number[:, 1:-1] >= _FEW
        np.divide(total[:, 1:-1], number[:, 1:-1], out=own, where=enough)
        self.values = own

    def _round_by_price(self) -> None:
        one, two = self.values[:, 0], self.values[:, 1]
        dearer = PRICE_OF_A_BIT * np.diff(self.bits[:, :3], axis=1)
        dead = one / 2 + dearer[:, 0] / (2 * one)
        second = (one + two) / 2 + dearer[:, 1] / (2 * (two - one))
        seen = self.counts[:, 1:3] >= _FEW
        dead = np.where(seen[:, 0], dead.clip(*_DEAD_ZONE), _PLAIN_DEAD_ZONE)
        offset = np.where(seen[:, 1], (2 - second).clip(*_OFFSET), _PLAIN_OFFSET)
        self.rounding = np.stack((dead, offset), axis=1)

    def widths(self) -> torch.Tensor:
        """Of every class the narrowest packed codes that not too many escape from: uint8 [C]."""
        total = self.counts.sum(1)
        chosen = np.full(len(total), WIDTHS[-1], np.uint8)
        for width, most in reversed(MOST_ESCAPES.items()):
            # Codes up to 2^width - 2 fit; the largest of them is of the last level but its sign.
            fitting = (1 << (width - 1)) - 1
            escaped = total - self.counts[:, : fitting + 1].sum(1)
            chosen[escaped <= most * total] = width
        return torch.from_numpy(chosen)


MOST_ESCAPES = {2: 0.2, 4: 0.1}
"""Width -> share of codes that may be escapes. DEFLATE makes as many bytes of narrow codes with
many escapes as of wide ones with few, but there are fewer bytes to inflate, which bounds a GPU."""
