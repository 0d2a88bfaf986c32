"""Plausible step plans for coefficients of Laplace tails, without data to fit them to."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch

from kvtc_vllm.codec.v2.plan import StepPlan

LEVELS = 15
"""Levels of a class that have a value of their own, as calibration has it."""
SINK_GAIN = 7.5
_CLASSES_PER_OCTAVE = 4
_DEAD_ZONE, _OFFSET = 0.6, 0.4
_LEAST_DEVIATION = 0.65
"""Columns of a smaller deviation, in steps, are not coded: they save less than they cost and one
bit, which is what calibration asks for. Marked tokens have half as many more."""
_WIDTHS = ((1.4, 2), (4.7, 4), (math.inf, 8))
"""Bits of packed codes up to a deviation in steps: as many escape as calibration allows."""


@lru_cache(maxsize=64)
def step_plan(p: int, ratio: float, spectrum: float) -> StepPlan:
    """Of rows of p elements of mean square 1, variance of component i falling as i ** -spectrum.

    The step is the one at which the entropy of all coded levels is the target ratio's bytes.
    """
    variances = torch.arange(1, p + 1, dtype=torch.float64) ** -spectrum
    deviations = (variances / variances.mean()).sqrt()

    def coded(step: float) -> torch.Tensor:
        return deviations[deviations >= _LEAST_DEVIATION * step]

    step = _step_of(coded, 16 * p / ratio)
    in_steps = deviations / step
    rank = int((in_steps >= _LEAST_DEVIATION).sum())
    token_bytes = float(_bits(in_steps[:rank]).sum()) / 8
    more = in_steps[rank : rank + rank // 2]
    beyond = _plan(more, step, token_bytes / 2, None) if len(more) else None
    return _plan(in_steps[:rank], step, token_bytes, beyond)


@lru_cache(maxsize=64)
def flat_step_plan(p: int, ratio: float, spectrum: float) -> StepPlan:
    """As many columns as `step_plan` codes, of coefficients that all have variance 1."""
    other = step_plan(p, ratio, spectrum)
    rank = other.rank
    deviations = torch.ones(rank, dtype=torch.float64)
    step = _step_of(lambda _: deviations, 16 * p / ratio)
    in_steps = deviations / step
    more = in_steps[: other.total_rank - rank]
    beyond = _plan(more, step, p / ratio, None) if len(more) else None
    return _plan(in_steps, step, 2 * p / ratio, beyond)


def _step_of(coded: Callable[[float], torch.Tensor], bits: float) -> float:
    """At which coefficients take so many, a float32. coded: deviations of those that are coded."""
    low, high = 1e-4, 1e3
    for _ in range(60):
        step = math.sqrt(low * high)
        if float(_bits(coded(step) / step).sum()) > bits:
            low = step
        else:
            high = step
    return float(torch.tensor(high))


def _plan(
    in_steps: torch.Tensor, step: float, token_bytes: float, beyond: StepPlan | None
) -> StepPlan:
    octave = (in_steps.log2() * _CLASSES_PER_OCTAVE).floor()
    found, classes = octave.unique(return_inverse=True)
    largest = 2 ** ((found + 1) / _CLASSES_PER_OCTAVE)
    widths = [next(bits for most, bits in _WIDTHS if float(d) <= most) for d in largest]
    values = step * (torch.arange(1, LEVELS + 1) - 0.05).expand(len(found), -1)
    return StepPlan(
        step=step,
        classes=classes.to(torch.uint8),
        widths=torch.tensor(widths, dtype=torch.uint8),
        values=values.float().contiguous(),
        rounding=torch.tensor([_DEAD_ZONE, _OFFSET]).expand(len(found), -1).contiguous(),
        sink_gain=SINK_GAIN,
        token_bytes=token_bytes,
        expected_error=float("nan"),
        beyond=beyond,
    )


def _bits(in_steps: torch.Tensor) -> torch.Tensor:
    """Entropy of the levels of Laplace coefficients of these deviations."""
    scale = in_steps / 2**0.5
    some = torch.exp(-_DEAD_ZONE / scale)
    more = torch.exp(-1 / scale)
    # Zero or not, a sign, and how many levels more, which is geometric.
    return _binary(some) + some * (1 + _binary(more) / (1 - more).clamp_min(1e-300))


def _binary(p: torch.Tensor) -> torch.Tensor:
    q = 1 - p
    return -(p * p.clamp_min(1e-300).log2() + q * q.clamp_min(1e-300).log2())
