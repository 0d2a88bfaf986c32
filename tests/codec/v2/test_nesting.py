"""Nested plans: halving levels gives exactly those of the coarser plan."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from kvtc_vllm.calibration.step_classes import Sample
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.codec.v2.nesting import halved, is_nested, nested_ratios
from kvtc_vllm.codec.v2.plan import StepPlan
from tests.codec.synthetic import SyntheticModel
from tests.codec.v2.made_up import fitted, step_artifact

MODEL = SyntheticModel(num_layers=3, num_kv_heads=2, head_size=16, layer_groups=((0, 2), (2, 3)))
RULE = SinkRule(layers=(1, 2), threshold=-1.0, max_share=0.05)


@cache
def artifact() -> RankArtifact:
    return step_artifact(MODEL, (6.0,), RULE, halvings=2)


def levels_of(plan: StepPlan, rows: torch.Tensor) -> torch.Tensor:
    """int32 [r, T] of rows [T, r]."""
    codes = plan.quantise(rows)
    return torch.where((codes & 1).bool(), (codes + 1) >> 1, -((codes + 1) >> 1))


def test_an_artifact_has_a_ratio_per_halving() -> None:
    coarser = nested_ratios(artifact())
    first, second = coarser[6.0], coarser[coarser[6.0]]
    assert artifact().ratios() == (6.0, first, second)
    assert second not in coarser
    assert 6 < first < second


@pytest.mark.parametrize("times", [1, 2])
def test_halved_levels_are_those_of_the_nested_plan(times: int) -> None:
    coarser = nested_ratios(artifact())
    fine = 6.0 if times == 1 else coarser[6.0]
    checked = 0
    for section in artifact().sections.values():
        plans = section.plans[fine], section.plans[coarser[fine]]
        for plan in plans:
            assert isinstance(plan, StepPlan)
        first, second = (plan for plan in plans if isinstance(plan, StepPlan))
        assert is_nested(second, first)
        deviation = section.basis.shape[1] ** 0.5 * first.step
        rows = torch.randn(400, first.total_rank, generator=torch.Generator().manual_seed(1))
        rows *= deviation * torch.logspace(0, -2, first.total_rank)
        levels = levels_of(first, rows)
        if first.beyond is not None:
            levels = torch.cat((levels, levels_of(first.beyond, rows[:, first.rank :])))
        rank = min(second.rank, first.rank)
        mine = halved(levels.numpy())
        assert (mine[:rank] == levels_of(second, rows[:, : second.rank]).numpy()[:rank]).all()
        if second.beyond is not None:
            own = rows[:, second.rank : second.total_rank]
            expected = levels_of(second.beyond, own).numpy()
            assert (mine[second.rank : second.total_rank] == expected).all()
            checked += int((expected != 0).sum())
    assert checked  # sinks, too


def test_halving_is_towards_zero() -> None:
    levels = torch.tensor([-5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5], dtype=torch.int32).numpy()
    assert halved(levels).tolist() == [-2, -2, -1, -1, 0, 0, 0, 1, 1, 2, 2]


def test_a_nested_plan_is_nearly_as_good_as_one_of_its_own() -> None:
    """Of the same bytes, in squared error: its values are the means of the bins that it has."""
    coefficients = torch.randn(2048, 60, generator=torch.Generator().manual_seed(0))
    coefficients *= torch.logspace(1, -1.5, 60)
    sample = Sample(coefficients, 0.0, 60)
    (plans,) = fitted([sample], (6.0,), halvings=1)
    ratio = max(plans)
    (own,) = fitted([sample], (ratio,))
    errors = [
        float(
            (coefficients[:, : plan.rank] - plan.restore(plan.quantise(coefficients)))
            .square()
            .sum()
        )
        + float(coefficients[:, plan.rank :].square().sum())
        for plan in (plans[ratio], own[ratio])
    ]
    assert errors[0] < 1.1 * errors[1]


def test_plans_of_any_two_ratios_are_not_nested() -> None:
    assert nested_ratios(step_artifact(MODEL, (4.0, 8.0), RULE)) == {}


def test_a_name_that_is_taken_is_refused() -> None:
    ratio = nested_ratios(artifact())[6.0]
    with pytest.raises(ArtifactError, match=f"gives {ratio:g}, which is in --ratios"):
        step_artifact(MODEL, (6.0, ratio), RULE, halvings=1)
