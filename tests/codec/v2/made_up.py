"""Step plans and artifacts of codec 2 for tests, fitted to rows of the synthetic model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from kvtc_vllm.calibration.step_classes import Sample, StepSettings
from kvtc_vllm.calibration.step_plans import make_step_plans
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.codec.transform import centred_rows, to_coefficients
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.codec.v2.plan import StepPlan
from tests.codec.synthetic import SyntheticModel


def step_plan_of(coefficients: torch.Tensor, row_size: int, ratio: float) -> StepPlan:
    """A plan of one section alone. coefficients: float32 [n, r], n a multiple of 128."""
    (plans,) = fitted([Sample(coefficients, 0.0, row_size)], (ratio,))
    return plans[ratio]


def fitted(
    samples: Sequence[Sample], ratios: Sequence[float], sinks: bool = False, halvings: int = 0
) -> list[dict[float, StepPlan]]:
    """Plans of all sections together. sinks: some rows are, which gives plans more columns.
    halvings: plans nested in those of each ratio."""
    rows = torch.arange(len(samples[0].coefficients))
    marks = (rows % 20 == 3) & torch.tensor(sinks)
    settings = StepSettings(halvings=halvings)
    found = make_step_plans(
        samples, marks, ratios, 0.0, ENTROPY, settings, lambda stage, done, total: None
    )
    return [dict(plans) for plans in found]


@lru_cache
def step_artifact(
    model: SyntheticModel,
    ratios: tuple[float, ...],
    rule: SinkRule | None = None,
    fit_rows: int = 512,
    halvings: int = 0,
    paired: bool = False,
) -> RankArtifact:
    """Bases as `SyntheticModel.artifact` fits them, step plans for each ratio."""
    base = model.artifact(ratios[:1], paired=paired)
    samples = []
    for key, section in base.sections.items():
        rows = model.rows(fit_rows, *key, seed=0)
        coefficients = to_coefficients(rows, section, section.basis.shape[1])
        outside = centred_rows(rows, section).square().sum() - coefficients.square().sum()
        samples.append(Sample(coefficients, max(0.0, float(outside)), rows.shape[1]))
    plans = fitted(samples, ratios, rule is not None, halvings)
    sections = {
        key: replace(section, basis=section.basis.contiguous(), plans=own)
        for (key, section), own in zip(base.sections.items(), plans, strict=True)
    }
    return replace(base, sections=sections, codec="kvtc2", sink_rule=rule)
