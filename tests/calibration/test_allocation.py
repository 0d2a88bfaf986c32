"""The allocation sees fewer columns than the basis has, and finds the same plans."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.calibration import allocation
from kvtc_vllm.calibration.allocation import live_columns, make_plans
from kvtc_vllm.calibration.fit_settings import FitSettings
from kvtc_vllm.calibration.pca import fit_basis
from kvtc_vllm.codec.artifact import SectionBasis
from kvtc_vllm.codec.bitplan import budget_bits
from kvtc_vllm.codec.payload import BitPlan

P = 256
SETTINGS = FitSettings(sizes=(1, 16, 32))
RATIOS = {16.0: 16.0, 32.0: 32.0}


def test_live_columns_grow_with_the_bits() -> None:
    falling = torch.logspace(2, -4, 200, dtype=torch.float64)
    counts = [live_columns(falling, bits, SETTINGS.sizes) for bits in (50, 100, 200, 400, 800)]
    assert counts == sorted(set(counts))
    # 2 bits and 32 / 32 of scales are the least per column.
    assert counts[2] <= 200 / 3
    assert live_columns(falling, 200 * 34, SETTINGS.sizes) == 200
    assert live_columns(torch.zeros(5), 3, SETTINGS.sizes) >= 1


def test_live_columns_are_about_those_of_the_plans() -> None:
    for ratio, plan in plans().items():
        expected = live_columns(variance(), budget_bits(P, ratio), SETTINGS.sizes)
        assert abs(plan.rank - expected) <= 16


class Shown:
    """`allocate`, remembering how many columns it was shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.columns: list[int] = []
        self._allocate = allocation.allocate
        monkeypatch.setattr(allocation, "allocate", self)

    def __call__(self, coefficients: torch.Tensor, *args: object, **more: object) -> object:
        self.columns.append(coefficients.shape[1])
        return self._allocate(coefficients, *args, **more)  # type: ignore[arg-type]


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1000, P, generator=generator) * torch.logspace(0, -3, P)


def variance() -> torch.Tensor:
    return fit_basis(rows()).variance


def plans() -> dict[float, BitPlan]:
    principal = fit_basis(rows())
    section = SectionBasis(principal.mean, principal.basis.half(), {})
    return make_plans(
        section, principal.variance, rows(), RATIOS, SETTINGS, lambda stage, done, total: None
    )


def test_the_plans_are_those_of_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    few = plans()
    assert len(shown.columns) == 1
    assert shown.columns[0] < 0.6 * P
    monkeypatch.setattr(allocation, "live_columns", lambda variance, bits, sizes: P)
    every = plans()
    assert shown.columns[1] == P
    for ratio, plan in every.items():
        assert plan.rank <= shown.columns[0] - max(SETTINGS.sizes)
        assert few[ratio].groups == plan.groups
        assert few[ratio].predicted_error == pytest.approx(plan.predicted_error, rel=1e-4)


def test_a_plan_that_reaches_the_end_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plans()
    monkeypatch.setattr(allocation, "live_columns", lambda variance, bits, sizes: 1)
    shown = Shown(monkeypatch)
    found = plans()
    assert len(shown.columns) > 1
    assert {r: p.groups for r, p in found.items()} == {r: p.groups for r, p in expected.items()}
