"""Acceptance: an artifact whose held-out error is above what its plans predict is not written.

Where rows are weighted, all errors here are of weighted rows: that is what plans are made for.
"""

from __future__ import annotations

import math

import torch

from kvtc_vllm.calibration.section_fit import orthonormality_defect
from kvtc_vllm.codec.artifact import RankArtifact, SectionBasis
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.registry import CODECS
from kvtc_vllm.codec.v2.codec import Kvtc2Codec

HELDOUT_FACTOR = 1.5
HELDOUT_SLACK = 0.005
"""Held-out error may be this much, absolute, above HELDOUT_FACTOR x predicted.

A plan that predicts 0.1 % may measure 0.65 %: at the lowest ratios the error is
mostly variance outside a basis fitted on few rows, which is small but not predicted.
"""

MAX_ORTHONORMALITY_DEFECT = 2e-3
"""Rounding a basis to float16 moves V^T V by 1e-4 or less; more means a broken solver."""

MAX_LOWEST_RATIO_ERROR = 0.25
"""At its lowest ratio an artifact must keep three quarters of the variance it has not seen.

Of K and V that divide one budget, because they are weighted or codec 2's, it is enough that one of
them does: the other may cost so little that it gets no bits.
"""


def check_artifact(artifact: RankArtifact, rank: int = 0) -> None:
    """Raise ArtifactError, one clear line, unless every section is fit to serve."""
    rules = CODECS[artifact.codec].rules
    assert rules is not None
    wrong = rules.wrong_sections(artifact.sections)
    if wrong is not None:
        raise ArtifactError(f"rank {rank}: {wrong}")
    for (group, kind), section in artifact.sections.items():
        _check_section(section, f"rank {rank} section {kind}{group}")
    _check_lowest_ratio(artifact, rank)


def _check_section(section: SectionBasis, name: str) -> None:
    for field, tensor in (("mean", section.mean), ("basis", section.basis)):
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{name}: {field} holds NaN or infinity; the fit failed")
    defect = orthonormality_defect(section.basis)
    if defect > MAX_ORTHONORMALITY_DEFECT:
        raise ArtifactError(
            f"{name}: basis columns are not orthonormal (largest defect {defect:.2g}, "
            f"allowed {MAX_ORTHONORMALITY_DEFECT:g}); the fit failed"
        )
    for ratio, plan in section.plans.items():
        where = f"{name} ratio {ratio:g}"
        _check_error(plan.expected_error, section.heldout_error.get(ratio), where)
    if not section.plans:
        raise ArtifactError(f"{name}: has no plans")


def _check_error(predicted: float, measured: float | None, name: str) -> None:
    if measured is None:
        raise ArtifactError(f"{name}: held-out error was not measured")
    if not (math.isfinite(predicted) and math.isfinite(measured)):
        raise ArtifactError(f"{name}: predicted error {predicted}, held-out {measured}; not finite")
    limit = HELDOUT_FACTOR * predicted + HELDOUT_SLACK
    if measured > limit:
        raise ArtifactError(
            f"{name}: held-out error {measured:.4f} is above {limit:.4f} (predicted "
            f"{predicted:.4f}); calibrate on more tokens, or on text like what will be served"
        )


def _check_lowest_ratio(artifact: RankArtifact, rank: int) -> None:
    for group in range(len(artifact.geometry.layer_groups)):
        pair = {f"{name}{group}": artifact.sections[group, name] for name in artifact.section_names}
        errors = {name: s.heldout_error[min(s.plans)] for name, s in pair.items()}
        weighted = all(section.weights is not None for section in pair.values())
        if weighted or artifact.codec == Kvtc2Codec.name:
            best = min(errors, key=lambda name: errors[name])
            errors = {best: errors[best]}
        for name, error in errors.items():
            if error > MAX_LOWEST_RATIO_ERROR:
                raise ArtifactError(
                    f"rank {rank} section {name} ratio {min(pair[name].plans):g}: held-out error "
                    f"{error:.3f} is above {MAX_LOWEST_RATIO_ERROR:g} at the lowest ratio; these "
                    "rows cannot be coded this way"
                )
