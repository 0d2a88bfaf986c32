"""Changed versions of our codec: what changes, and which artifacts can be changed so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvtc_vllm.codec.artifact import KINDS, RankArtifact
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.payload import bit_plan
from kvtc_vllm.evaluation.replay.variants import VARIANTS, VariantContext
from tests.codec.synthetic import SyntheticModel
from tests.codec.v2.made_up import step_artifact

MODEL = SyntheticModel(num_layers=2, num_kv_heads=2, head_size=16)
RATIO = 8.0


@pytest.fixture(scope="module")
def artifact() -> RankArtifact:
    return MODEL.artifact((4.0, RATIO, 16.0))


def context(artifact: RankArtifact, **options: Any) -> VariantContext:
    return VariantContext(artifact, RATIO, torch.bfloat16, options)


def test_keys_and_values_have_plans_of_other_ratios(artifact: RankArtifact) -> None:
    codec = VARIANTS["mixed-ratios"](context(artifact, k=4.0, v=16.0))
    for kind, ratio in zip(KINDS, (4.0, 16.0), strict=True):
        own = bit_plan(codec.artifact.sections[0, kind], RATIO)
        assert own.groups == bit_plan(artifact.sections[0, kind], ratio).groups
    k, v = MODEL.chunk(32, 64)
    assert codec.decode(codec.encode(k, v, 64), 64, 32).k.shape == k.shape


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_leading_coefficients_have_one_type(artifact: RankArtifact, name: str) -> None:
    codec = VARIANTS["truncated"](context(artifact, type=name, size=4))
    for section in codec.artifact.sections.values():
        groups = bit_plan(section, RATIO).groups
        assert {(group.type, group.size) for group in groups} == {(name, 4)}
        assert [group.start for group in groups] == list(range(0, 4 * len(groups), 4))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(
    ("variant", "options"),
    [("mixed-ratios", {"k": RATIO, "v": RATIO}), ("truncated", {"type": "int4", "size": 4})],
)
def test_bit_plans_are_of_version_1(variant: str, options: dict[str, Any], paired: bool) -> None:
    steps = step_artifact(MODEL, (RATIO,), paired=paired)
    with pytest.raises(ArtifactError, match=r"changes bit plans, .* codec 'kvtc2'; take one for"):
        VARIANTS[variant](context(steps, **options))


@pytest.mark.parametrize("variant", ["unchanged", "coded-sinks", "rope-kept"])
def test_pairs_are_coded_by_what_changes_no_plan(variant: str) -> None:
    codec = VARIANTS[variant](context(step_artifact(MODEL, (RATIO,), paired=True)))
    k, v = MODEL.chunk(32, 64)
    decoded = codec.decode(codec.encode(k, v, 64), 64, 32)
    assert float((decoded.v.float() - v.float()).norm() / v.float().norm()) < 0.5
