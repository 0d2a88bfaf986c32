from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kvtc_vllm.calibration.acceptance import check_artifact
from kvtc_vllm.calibration.fit import RankFit
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.payload import CoefficientGroup

SECTION = (1, "k")


def changed(fit: RankFit, **changes: Any) -> RankArtifact:
    """The artifact with fields of one section replaced."""
    sections = dict(fit.artifact.sections)
    sections[SECTION] = dataclasses.replace(sections[SECTION], **changes)
    return dataclasses.replace(fit.artifact, sections=sections)


def test_good_artifact_passes(fit: RankFit) -> None:
    assert check_artifact(fit.artifact) is None  # type: ignore[func-returns-value]


def test_heldout_error_far_above_the_predicted(fit: RankFit) -> None:
    errors = dict(fit.artifact.sections[SECTION].heldout_error)
    errors[8.0] = 0.95
    with pytest.raises(ArtifactError, match=r"rank 3 section k1 ratio 8: held-out error 0\.95"):
        check_artifact(changed(fit, heldout_error=errors), rank=3)


def test_heldout_not_measured(fit: RankFit) -> None:
    with pytest.raises(ArtifactError, match="not measured"):
        check_artifact(changed(fit, heldout_error={}))


def test_not_finite(fit: RankFit) -> None:
    section = fit.artifact.sections[SECTION]
    mean = section.mean.clone()
    mean[0] = float("inf")
    with pytest.raises(ArtifactError, match="mean holds NaN"):
        check_artifact(changed(fit, mean=mean))
    errors = section.heldout_error | {4.0: float("nan")}
    with pytest.raises(ArtifactError, match="not finite"):
        check_artifact(changed(fit, heldout_error=errors))


def test_basis_not_orthonormal(fit: RankFit) -> None:
    basis = fit.artifact.sections[SECTION].basis * 1.01
    with pytest.raises(ArtifactError, match="orthonormal"):
        check_artifact(changed(fit, basis=basis))


def test_of_weighted_keys_and_values_one_must_be_kept(fit: RankFit) -> None:
    """They divide one budget; what hardly matters may get no bits of it."""
    sections = {}
    for key, section in fit.artifact.sections.items():
        lost = {ratio: 0.9 for ratio in section.plans} if key == SECTION else section.heldout_error
        plans = {
            r: dataclasses.replace(p, predicted_error=lost[r]) for r, p in section.plans.items()
        }
        sections[key] = dataclasses.replace(section, plans=plans, heldout_error=lost)
    lost_keys = dataclasses.replace(fit.artifact, sections=sections)
    with pytest.raises(ArtifactError, match=r"section k1 ratio 2: held-out error 0\.900 is above"):
        check_artifact(lost_keys)

    def weighted(artifact: RankArtifact) -> RankArtifact:
        changed = {
            key: dataclasses.replace(s, weights=torch.ones_like(s.mean))
            for key, s in artifact.sections.items()
        }
        return dataclasses.replace(artifact, sections=changed)

    check_artifact(weighted(lost_keys))
    both = dict(sections)
    both[1, "v"] = dataclasses.replace(
        sections[1, "v"],
        plans={
            r: dataclasses.replace(p, predicted_error=0.8)
            for r, p in sections[1, "v"].plans.items()
        },
        heldout_error={r: 0.8 for r in sections[1, "v"].plans},
    )
    with pytest.raises(ArtifactError, match=r"section v1 ratio 2: held-out error 0\.800 is above"):
        check_artifact(weighted(dataclasses.replace(fit.artifact, sections=both)))


def test_budget_exceeded(fit: RankFit) -> None:
    plans = dict(fit.artifact.sections[SECTION].plans)
    groups = tuple(CoefficientGroup(i, 1, "fp8") for i in range(20))
    plans[8.0] = dataclasses.replace(plans[8.0], groups=groups)
    message = "ratio 8 take K 800 and V 0 bits a row, the budget is 96"
    with pytest.raises(ArtifactError, match=message):
        check_artifact(changed(fit, plans=plans))


def test_lowest_ratio_must_be_good(fit: RankFit) -> None:
    section = fit.artifact.sections[SECTION]
    plans = {2.0: dataclasses.replace(section.plans[2.0], predicted_error=0.3)}
    with pytest.raises(ArtifactError, match="lowest ratio"):
        check_artifact(changed(fit, plans=plans, heldout_error={2.0: 0.3}))


def test_no_plans(fit: RankFit) -> None:
    with pytest.raises(ArtifactError, match="no plans"):
        check_artifact(changed(fit, plans={}, basis=torch.eye(32, 4).half()))
