"""Step plans: rounding, values, limits, and what a rank file keeps of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvtc_vllm.artifact.fingerprint import artifact_fingerprint
from kvtc_vllm.artifact.rank_file import Probe, read_rank_file, write_rank_file
from kvtc_vllm.codec.errors import ArtifactError, CodecError
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.codec.v2.plan import StepPlan, over_ratio
from tests.codec.synthetic import SyntheticModel
from tests.codec.v2.made_up import step_artifact, step_plan_of

MODEL = SyntheticModel(num_layers=2, num_kv_heads=2, head_size=16, layer_groups=((0, 1), (1, 2)))

PLAN = StepPlan(
    step=0.5,
    classes=torch.tensor([1, 0, 0], dtype=torch.uint8),
    widths=torch.tensor([2, 4], dtype=torch.uint8),
    values=torch.tensor([[0.6, 1.1], [0.5, 1.0]]),
    rounding=torch.tensor([[0.75, 0.25], [0.5, 0.5]]),
    sink_gain=4.0,
    token_bytes=10.0,
    expected_error=0.1,
)


def test_rounding_and_values_are_the_class_s() -> None:
    """Column 0 is of class 1, which has offset 1/2; the others of class 0, with dead zone 3/4."""
    x = torch.tensor([0.0, 0.2, -0.3, 0.37, -0.4, 0.86, -0.9, 2.6])
    codes = PLAN.quantise(torch.stack((x, x, -x), dim=1))
    assert codes.tolist() == [
        [0, 0, 2, 1, 2, 3, 4, 9],
        [0, 0, 0, 0, 2, 1, 4, 9],
        [0, 0, 0, 0, 1, 2, 3, 10],
    ]
    restored = PLAN.restore(codes)
    assert restored.dtype == torch.float32
    assert restored[:, 0].tolist() == [0, 0, -0.5, 0.5, -0.5, 1.0, -1.0, 2.5]
    wanted = torch.tensor([0, 0, 0, 0, -0.6, 0.6, -1.1, 2.5])
    assert torch.equal(restored[:, 1], wanted)
    assert torch.equal(restored[:, 2], -wanted)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 16384.0])
def test_what_has_no_code_is_refused(wrong: float) -> None:
    x = torch.zeros(4, 3)
    x[2, 1] = wrong
    with pytest.raises(CodecError) as caught:
        PLAN.encode(x, ENTROPY)
    assert caught.value.reason == "range"
    x[2, 1] = 16383.0
    codes = PLAN.quantise(x)
    assert float(PLAN.restore(codes)[2, 1]) == 16383.0


def test_what_is_unlike_the_calibration_data_is_refused() -> None:
    """More than twice the bytes: noise in the place of falling variances."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(512, 64, generator=generator)
    plan = step_plan_of(drawn * torch.logspace(0.5, -2, 64), 64, 8.0)
    known = drawn[:128] * torch.logspace(0.5, -2, 64)
    coded = plan.encode(known, ENTROPY)
    assert len(coded.encoded.body) <= plan.max_bytes(128)
    with pytest.raises(CodecError, match="unlike the calibration data") as caught:
        plan.encode(100 * drawn[:128], ENTROPY)
    assert caught.value.reason == "size"


def test_a_rank_file_keeps_plans(tmp_path: Path) -> None:
    path = tmp_path / "rank0of1.safetensors"
    made = written(path)
    loaded, _ = read_rank_file(path, 0, 1)
    assert (loaded.codec, loaded.fingerprint) == ("kvtc2", made.fingerprint)
    k, v = MODEL.chunk(40, 16)
    blobs = {
        open_codec("kvtc2", torch.bfloat16, artifact=a, ratio=8.0, fast=False).encode(k, v, 16)
        for a in (made, loaded)
    }
    assert len(blobs) == 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("numbers", lambda x: x * 0, "has step 0"),
        ("numbers", lambda x: x + torch.tensor([1e-9, 0, 0]), "a float32 in"),
        ("numbers", lambda x: torch.tensor([x[0], 0.5, x[2]]).double(), "gain 0.5 of marked"),
        ("numbers", lambda x: torch.tensor([x[0], x[1], -1.0]).double(), "bytes per token"),
        ("widths", lambda x: x * 0 + 3, "1 to 256 of"),
        ("classes", lambda x: x + 200, "must be below"),
        ("classes", lambda x: x.repeat(9), "at most"),
        ("values", lambda x: -x, "must be positive"),
        ("rounding", lambda x: -x - 1, "must be 0 to"),
        ("numbers", lambda x: x * torch.tensor([1.0, 1.0, 4.0]), "bytes per token on calibration"),
    ],
)
def test_wrong_plans_are_refused(
    tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    path = tmp_path / "rank0of1.safetensors"
    written(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[f"k0.{name}0"] = change(tensors[f"k0.{name}0"])
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ArtifactError, match=message):
        read_rank_file(path, 0, 1)


def test_whatever_changes_bytes_changes_the_fingerprint() -> None:
    artifact = step_artifact(MODEL, (8.0,))
    section = artifact.sections[0, "k"]
    plan = section.plans[8.0]
    assert isinstance(plan, StepPlan)

    def fingerprint(**changes: object) -> bytes:
        changed = replace(section, plans={8.0: replace(plan, **changes)})
        sections = {**artifact.sections, (0, "k"): changed}
        return artifact_fingerprint(artifact.geometry, sections, 4)

    changes: list[dict[str, object]] = [
        {},
        {"step": plan.step * 2},
        {"classes": plan.classes.flip(0)},
        {"widths": torch.where(plan.widths == 8, 4, 8).to(torch.uint8)},
        {"values": plan.values * 2},
        {"rounding": plan.rounding * 2},
        {"sink_gain": 2.0},
        {"token_bytes": plan.token_bytes + 1},
    ]
    assert len({fingerprint(**change) for change in changes}) == len(changes)
    assert fingerprint(expected_error=0.9) == fingerprint()


def test_plans_that_miss_their_ratio_are_told() -> None:
    artifact = step_artifact(MODEL, (4.0, 8.0))
    assert over_ratio(artifact.sections) is None
    late = {
        key: replace(section, plans={16.0: section.plans[8.0]})
        for key, section in artifact.sections.items()
    }
    assert "plans of ratio 16 take" in str(over_ratio(late))


def written(path: Path):
    """A rank file of the model's artifact, and the artifact."""
    artifact = step_artifact(MODEL, (8.0,))
    sections = {
        key: replace(section, heldout_error={8.0: 0.2})
        for key, section in artifact.sections.items()
    }
    fingerprint = artifact_fingerprint(artifact.geometry, sections, artifact.sink_tokens)
    whole = replace(artifact, sections=sections, fingerprint=fingerprint)
    k, v = (x.half() for x in MODEL.chunk(4))
    probe = Probe(k=k, v=v, positions=torch.arange(4, dtype=torch.int32))
    write_rank_file(path, whole, probe, 0, 1)
    return whole
