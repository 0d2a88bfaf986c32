"""Bases in 8 bits: what rounding changes, what a file would take, and pairs of documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.basis_bits import LEADING, SIXTEEN, WAYS, Way, change, rounded, stored_bytes
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.codec.artifact import RankArtifact

SHIPPED = Path(__file__).parents[2] / "calibrations/kvtc-reference/tp1-all-af3a0224"


@pytest.fixture(scope="module")
def artifact() -> RankArtifact:
    return load_rank_artifact(SHIPPED, 0)[0]


@pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: way.name)
def test_rounding_is_within_half_a_step(artifact: RankArtifact, way: Way) -> None:
    found = rounded(artifact, way)
    for key, section in artifact.sections.items():
        before, after = section.basis.float(), found.sections[key].basis.float()
        leading = way.leading or 0
        assert torch.equal(before[:, :leading], after[:, :leading])
        blocks = artifact.geometry.num_layers if way.by_layer else 1
        parts = before[:, leading:].reshape(blocks, -1, before.shape[1] - leading)
        largest = parts.abs().amax(dim=1, keepdim=True)
        error = (after[:, leading:].reshape(parts.shape) - parts).abs()
        assert (error.amax(dim=1) > 0).any()
        # Beside half a step: the scale and the product are float16, and that has a least step.
        assert (error <= 0.5 * largest / 127 + largest * 2**-10 + 2**-24 * 127).all()
        assert found.sections[key].plans == section.plans


def test_sixteen_bits_are_the_artifact_itself(artifact: RankArtifact) -> None:
    found = rounded(artifact, SIXTEEN)
    for key, section in artifact.sections.items():
        assert torch.equal(section.basis, found.sections[key].basis)


def test_eight_bits_take_about_half(artifact: RankArtifact) -> None:
    ratios = (16.0, 32.0)
    shapes = [
        (section.basis.shape[0], max(section.plans[ratio].rank for ratio in ratios))
        for section in artifact.sections.values()
    ]
    layers = artifact.geometry.num_layers
    sixteen, eight, by_layer, tail = (stored_bytes(artifact, ratios, way) for way in WAYS)
    assert sixteen - eight == sum(rows * columns - 2 * columns for rows, columns in shapes)
    assert by_layer - eight == sum(2 * (layers - 1) * columns for _, columns in shapes)
    assert tail - eight == sum(LEADING * (rows - 2) for rows, _ in shapes)
    assert stored_bytes(artifact, (32.0,), SIXTEEN) < sixteen


def test_changes_are_of_the_same_documents() -> None:
    def row(artifact: str, ratio: float, values: list[float]) -> dict[str, Any]:
        return {"artifact": artifact, "target_ratio": ratio, "by_document": values}

    rows = [
        row("plain: 16 bits", 16.0, [0.1, 0.3]),
        row("plain: 16 bits", 32.0, [9.0, 9.0]),
        row("other: 16 bits", 16.0, [9.0, 9.0]),
        row("plain: 8 bits", 16.0, [0.2, 0.3]),
    ]
    assert change(rows[3], rows) == (0.05, (0.0, 0.1))
    assert change(rows[0], rows) == (0.0, (0.0, 0.0))
