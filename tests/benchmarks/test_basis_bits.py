"""Bases in 8 bits: what rounding changes, what a file would take, and pairs of documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.basis_bits import change, in_eight_bits, stored_bytes
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.codec.artifact import RankArtifact

SHIPPED = Path(__file__).parents[2] / "calibrations/kvtc-reference/tp1-all-af3a0224"


@pytest.fixture(scope="module")
def artifact() -> RankArtifact:
    return load_rank_artifact(SHIPPED, 0)[0]


def test_rounding_is_within_half_a_step_of_each_column(artifact: RankArtifact) -> None:
    rounded = in_eight_bits(artifact)
    for key, section in artifact.sections.items():
        before, after = section.basis.float(), rounded.sections[key].basis.float()
        step = before.abs().amax(dim=0) / 127
        error = (after - before).abs().amax(dim=0)
        assert (error > 0).all()
        # Beside half a step: the scale and the product are float16.
        assert (error <= 0.5 * step + 127 * step * 2**-10).all()
        assert all((column.unique().numel() <= 255) for column in after.T)
        assert rounded.sections[key].plans == section.plans


def test_eight_bits_take_about_half(artifact: RankArtifact) -> None:
    ratios = (16.0, 32.0)
    columns = {
        key: max(section.plans[ratio].rank for ratio in ratios)
        for key, section in artifact.sections.items()
    }
    elements = sum(artifact.sections[key].basis.shape[0] * n for key, n in columns.items())
    sixteen, eight = (stored_bytes(artifact, ratios, bits) for bits in (16, 8))
    assert sixteen - eight == elements - 2 * sum(columns.values())
    assert stored_bytes(artifact, (32.0,), 16) < sixteen


def test_changes_are_of_the_same_documents() -> None:
    def row(artifact: str, ratio: float, values: list[float]) -> dict[str, Any]:
        return {"artifact": artifact, "target_ratio": ratio, "by_document": values}

    rows = [
        row("plain, 16 bits", 16.0, [0.1, 0.3]),
        row("plain, 16 bits", 32.0, [9.0, 9.0]),
        row("other, 16 bits", 16.0, [9.0, 9.0]),
        row("plain, 8 bits", 16.0, [0.2, 0.3]),
    ]
    assert change(rows[3], rows) == (0.05, (0.0, 0.1))
    assert change(rows[0], rows) == (0.0, (0.0, 0.0))
