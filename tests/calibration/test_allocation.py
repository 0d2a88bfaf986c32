"""The allocation sees fewer columns than the basis has, and finds the same plans."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.calibration import allocation
from kvtc_vllm.calibration.allocation import live_columns, make_plans
from kvtc_vllm.calibration.fit_settings import FitSettings
from kvtc_vllm.calibration.pca import fit_basis
from kvtc_vllm.codec.artifact import SectionBasis
from kvtc_vllm.codec.payload import BitPlan

P = 256
SETTINGS = FitSettings(sizes=(1, 16, 32))
RATIOS = {16.0: 16.0, 32.0: 32.0}


def test_live_columns_of_two_levels() -> None:
    # 4 columns of variance 16 over 4 of variance 1: 2 bits each bring the first to level 1.
    variance = torch.tensor([16.0] * 4 + [1.0] * 4)
    assert live_columns(variance, 7) == 4
    assert live_columns(variance, 9) == 8
    assert live_columns(torch.zeros(5), 3) >= 1


def test_live_columns_solve_the_water_filling() -> None:
    variance = torch.logspace(2, -4, 200, dtype=torch.float64)
    for bits in (20, 100, 400):
        k = live_columns(variance, bits)
        level = 2 ** float((variance[:k].log2().sum() - 2 * bits) / k)
        assert variance[k - 1] > level >= variance[k]
        assert float((variance[:k] / level).log2().sum() / 2) == pytest.approx(bits)


class Shown:
    """`allocate`, remembering how many columns it was shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.columns: list[int] = []
        self._allocate = allocation.allocate
        monkeypatch.setattr(allocation, "allocate", self)

    def __call__(self, coefficients: torch.Tensor, *args: object, **more: object) -> object:
        self.columns.append(coefficients.shape[1])
        return self._allocate(coefficients, *args, **more)  # type: ignore[arg-type]


def plans() -> dict[float, BitPlan]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, P, generator=generator) * torch.logspace(0, -3, P)
    principal = fit_basis(rows)
    section = SectionBasis(principal.mean, principal.basis.half(), {})
    return make_plans(
        section, principal.variance, rows, RATIOS, SETTINGS, lambda stage, done, total: None
    )


def test_the_plans_are_those_of_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    few = plans()
    assert len(shown.columns) == 1
    assert shown.columns[0] < 0.6 * P
    monkeypatch.setattr(allocation, "live_columns", lambda variance, bits: P)
    every = plans()
    assert shown.columns[1] == P
    for ratio, plan in every.items():
        assert few[ratio].groups == plan.groups
        assert few[ratio].predicted_error == pytest.approx(plan.predicted_error, rel=1e-4)


def test_a_plan_that_reaches_the_end_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plans()
    monkeypatch.setattr(allocation, "live_columns", lambda variance, bits: 1)
    shown = Shown(monkeypatch)
    found = plans()
    assert len(shown.columns) > 1
    assert {r: p.groups for r, p in found.items()} == {r: p.groups for r, p in expected.items()}
