"""The allocation sees fewer columns than the basis has, and finds the same plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtc_vllm.calibration import allocation
from kvtc_vllm.calibration.allocation import divide_budget, live_columns, make_table
from kvtc_vllm.calibration.fit_settings import FitSettings
from kvtc_vllm.calibration.pca import fit_basis
from kvtc_vllm.codec.artifact import Kind, SectionBasis
from kvtc_vllm.codec.bitplan import AllocationTable, budget_bits, tabulate
from kvtc_vllm.codec.payload import BitPlan

P = 256
SETTINGS = FitSettings(sizes=(1, 16, 32))
RATIOS = (16.0, 32.0)


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
    """`tabulate`, remembering how many columns it was shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.columns: list[int] = []
        self._tabulate = allocation.tabulate
        monkeypatch.setattr(allocation, "tabulate", self)

    def __call__(self, coefficients: torch.Tensor, *args: object, **more: object) -> object:
        self.columns.append(coefficients.shape[1])
        return self._tabulate(coefficients, *args, **more)  # type: ignore[arg-type]


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1000, P, generator=generator) * torch.logspace(0, -3, P)


def variance() -> torch.Tensor:
    return fit_basis(rows()).variance


def plans() -> dict[float, BitPlan]:
    principal = fit_basis(rows())
    section = SectionBasis(principal.mean, principal.basis.half(), {})
    budgets = [budget_bits(P, ratio) for ratio in RATIOS]
    table = make_table(
        section, principal.variance, rows(), budgets, SETTINGS, lambda stage, done, total: None
    )
    return {r: table.plan(r, bits) for r, bits in zip(RATIOS, budgets, strict=True)}


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


def table_of(scale: float, seed: int) -> AllocationTable:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(300, 48, generator=generator) * torch.logspace(0, -2, 48) * scale
    return tabulate(drawn, 64, 1024, sizes=(1, 16), residual_energy=3.0)


def test_expected_errors_are_those_of_the_plans() -> None:
    table = table_of(1.0, 1)
    assert (np.diff(table.errors) <= 0).all()
    for bits in (0, 50, 200, 700):
        plan = table.plan(8.0, bits)
        # The same rows quantised as a whole.
        measured = plan.predicted_error * table.total
        assert measured == pytest.approx(table.errors[bits // table.unit], rel=1e-3)


def test_a_budget_is_divided_as_no_other_division_beats() -> None:
    tables: dict[Kind, AllocationTable] = {"k": table_of(1.0, 1), "v": table_of(5.0, 2)}

    def error(bits: dict[Kind, int]) -> float:
        return sum(
            table.plan(8.0, bits[kind]).predicted_error * table.total
            for kind, table in tables.items()
        )

    for budget in (100, 400, 1024, 5000):
        best = divide_budget(tables, budget)
        assert sum(best.values()) <= budget
        for keys in range(0, min(budget, 1024) + 1, 50):
            other: dict[Kind, int] = {"k": keys, "v": min(budget - keys, 1024)}
            assert error(best) <= error(other) * 1.001
    # What weighs more gets more.
    assert divide_budget(tables, 400)["v"] > divide_budget(tables, 400)["k"]
    equal = {"k": tables["k"], "v": tables["k"]}
    assert divide_budget(equal, 400)["k"] == pytest.approx(200, abs=60)
