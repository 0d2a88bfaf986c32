"""Plans of codec 2: one step for all sections, found so that real bytes meet the target ratio.

A trial step gives every section a plan (`step_classes`), which quantises and codes the sample as a
blob would; the bytes are counted, and the step is changed until they are right. All sections share
it, so an error costs the same in K and V and in every layer group, and each gets the bytes that
this takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvtc_vllm.calibration.step_classes import Sample, StepSettings, make_step_plan
from kvtc_vllm.codec.container import section_bytes
from kvtc_vllm.codec.entropy import UNIT_BYTES, EntropyCoder, aligned
from kvtc_vllm.codec.errors import ArtifactError, CodecError
from kvtc_vllm.codec.v2.codes import encode_codes
from kvtc_vllm.codec.v2.plan import ELEMENT_BYTES, StepPlan

CHUNK_TOKENS = 128
"""Tokens of the chunks that bytes are counted of."""
ACCURACY = 0.005
"""Relative, of bytes per token."""
_MOST_TRIALS = 24

LAST_ACCURACY = 0.02
"""Where no step comes nearer."""
_ROOM = 8
"""Times the step at which codes end, where fewer bytes do: rows that are served may vary more."""
NAME_DIGITS = 1
"""Of ratios that are found, not asked for."""


@dataclass(frozen=True)
class _Found:
    step: float
    plans: list[StepPlan]
    bytes: list[float]
    beyond: list[float]

    @property
    def total(self) -> float:
        return sum(self.bytes)


def make_step_plans(
    samples: Sequence[Sample],
    marks: torch.Tensor,
    ratios: Sequence[float],
    overhead: float,
    entropy: EntropyCoder,
    settings: StepSettings,
    report: Callable[[str, int, int], None],
) -> list[Mapping[float, StepPlan]]:
    """Of every section, target ratio -> plan; with halvings also plans nested in those, by the
    ratio that they have.

    samples: of all sections of a rank, of the same tokens, whose number is a multiple of
    `CHUNK_TOKENS`. marks: bool [n], the sinks among them. overhead: bytes per token of a blob
    besides its coded sections. Raises ArtifactError for a ratio that can't be met.
    """
    row = sum(sample.row_size for sample in samples)

    def trial(step: float, fine: _Found | None = None) -> _Found:
        rounded = float(torch.tensor(step))
        finer = [None] * len(samples) if fine is None else fine.plans
        plans = [
            make_step_plan(sample, marks, rounded, settings, own)
            for sample, own in zip(samples, finer, strict=True)
        ]
        taken = [
            coded_bytes(plan, sample, marks, entropy)
            for plan, sample in zip(plans, samples, strict=True)
        ]
        return _Found(rounded, plans, [all_of for all_of, _ in taken], [own for _, own in taken])

    found: dict[float, _Found] = {}
    step = _deviation(samples)
    for done, ratio in enumerate(sorted(ratios)):
        report("allocate", done, len(ratios))
        target = ELEMENT_BYTES * row / ratio - overhead
        if target <= 0:
            raise ArtifactError(
                f"ratio {ratio:g} can't be met: headers and exact sinks alone take {overhead:.0f} "
                f"of {ELEMENT_BYTES * row / ratio:.0f} bytes per token; take a lower one"
            )
        found[ratio] = _search(trial, target, step, ratio)
        step = found[ratio].step * 1.5
    names = iter(settings.nested)
    for ratio in sorted(ratios):
        lower = found[ratio]
        for times in range(1, settings.halvings + 1):
            lower = trial(2 * lower.step, lower)
            own = ELEMENT_BYTES * row / (lower.total + overhead)
            name = next(names) if settings.nested else round(own, NAME_DIGITS)
            if name in found:
                raise ArtifactError(
                    f"halving ratio {ratio:g} {times} times gives {name:g}, which is in --ratios; "
                    "leave one of the two out"
                )
            found[name] = lower
    return [
        {
            ratio: _with_bytes(result.plans[i], result.bytes[i], result.beyond[i])
            for ratio, result in found.items()
        }
        for i in range(len(samples))
    ]


def _with_bytes(plan: StepPlan, of_tokens: float, of_sinks: float) -> StepPlan:
    beyond = None if plan.beyond is None else replace(plan.beyond, token_bytes=of_sinks)
    return replace(plan, token_bytes=of_tokens, beyond=beyond)


def coded_bytes(
    plan: StepPlan, sample: Sample, marks: torch.Tensor, entropy: EntropyCoder
) -> tuple[float, float]:
    """Bytes per token in blobs of `CHUNK_TOKENS`, entries in the table included; and per sink.

    The former of all of the section, the latter of what sinks have beyond the plan's rank. Of
    whatever the plan's own bound, which is not known yet.
    """
    gains = torch.where(marks, plan.sink_gain, 1.0)[:, None]
    taken = of_sinks = 0

    def stored(own: StepPlan, coefficients: torch.Tensor) -> int:
        encoded = entropy.encode(encode_codes(own.quantise(coefficients), own.packed))
        return UNIT_BYTES * len(encoded.units) + aligned(len(encoded.body))

    for first in range(0, len(marks), CHUNK_TOKENS):
        rows = slice(first, first + CHUNK_TOKENS)
        coefficients = sample.coefficients[rows] * gains[rows]
        taken += section_bytes(stored(plan, coefficients[:, : plan.rank]))
        if bool(marks.any()):
            taken += section_bytes(0)
        if plan.beyond is not None and bool(marks[rows].any()):
            own = coefficients[marks[rows], plan.rank : plan.total_rank]
            of_sinks += stored(plan.beyond, own)
    return (taken + of_sinks) / len(marks), of_sinks / max(1, int(marks.sum()))


def _search(trial: Callable[[float], _Found], target: float, start: float, ratio: float) -> _Found:
    """Bytes fall as the step grows, nearly as a power of it."""
    low: _Found | None = None
    high: _Found | None = None
    step = start
    for _ in range(_MOST_TRIALS):
        try:
            found = trial(step)
        except CodecError:
            # Codes end here, and these rows do not need the bytes that there are.
            return trial(_ROOM * step)
        if abs(found.total / target - 1) <= ACCURACY:
            return found
        if found.total > target:
            low = found
        else:
            high = found
        if low is None:
            step /= 2
        elif high is None:
            step *= 2
        else:
            step = _between(low, high, target)
            if step in (low.step, high.step):
                break
    # Few coefficients have few sizes. What is below the target costs quality and nothing else.
    if low is not None and low.total <= target * (1 + LAST_ACCURACY):
        return low
    if high is not None:
        return high
    raise ArtifactError(
        f"ratio {ratio:g} can't be met: {found.total:.0f} bytes per token at a step of "
        f"{found.step:g}, the target is {target:.0f}"
    )


def _between(low: _Found, high: _Found, target: float) -> float:
    """A step between two, where bytes would be right if they fell as a power."""
    fallen = math.log(low.total / max(high.total, 1e-9))
    share = math.log(low.total / target) / fallen
    share = min(max(share, 0.05), 0.95)
    return float(torch.tensor(low.step * (high.step / low.step) ** share))


def _deviation(samples: Sequence[Sample]) -> float:
    """Root mean square of all coefficients: where the search begins."""
    energy = sum(float(s.coefficients.double().square().mean(0).sum()) for s in samples)
    columns = sum(s.coefficients.shape[1] for s in samples)
    return max(math.sqrt(energy / columns), 1e-20)
