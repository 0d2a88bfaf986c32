"""Bases in parts: orthonormal, 0 outside their part, and nearly as good as whole ones."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.calibration.parts import fit_in_parts, part_elements
from kvtc_vllm.calibration.pca import Rows, fit_basis
from kvtc_vllm.codec.artifact import Geometry

P, PARTS = 60, 3


def rows(count: int = 500) -> Rows:
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(P, P, generator=generator)).Q
    drawn = torch.randn(count, P, generator=generator) * torch.logspace(1, -2, P) @ directions.T
    return Rows(count, P, lambda: iter((drawn + 3.0).split(128)))


def parts() -> list[torch.Tensor]:
    return [torch.arange(P)[i::PARTS] for i in range(PARTS)]


@pytest.mark.parametrize("turned", [1, 12, P])
def test_a_basis_in_parts(turned: int) -> None:
    found = fit_in_parts(rows(), parts(), turned, rank_cap=P)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(P), atol=1e-5, rtol=0)
    of_parts = torch.stack([(found.basis[part] != 0).any(dim=0) for part in parts()]).sum(dim=0)
    # With one of them there is nothing to turn it with.
    assert int((of_parts > 1).sum()) == (0 if turned == 1 else turned)
    assert int(of_parts.min()) == 1 or turned == P
    assert bool((found.variance.diff() <= 0).all())
    coefficients = torch.cat(list(rows().blocks())) - found.mean
    measured = (coefficients @ found.basis).square().mean(dim=0).double()
    torch.testing.assert_close(measured, found.variance, rtol=1e-4, atol=1e-5)
    assert found.total_variance == pytest.approx(float(found.variance.sum()), rel=1e-5)


def test_turning_all_gives_the_principal_directions() -> None:
    whole = fit_basis(rows(), method="eigh")
    found = fit_in_parts(rows(), parts(), P, rank_cap=20)
    torch.testing.assert_close(found.variance, whole.variance[:20], rtol=1e-4, atol=0)
    torch.testing.assert_close(found.basis, whole.basis[:, :20], rtol=0, atol=1e-3)
    torch.testing.assert_close(found.mean, whole.mean)


def test_more_turned_columns_catch_more() -> None:
    kept = [
        float(fit_in_parts(rows(), parts(), turned, rank_cap=10).variance.sum())
        for turned in (1, 6, 20, P)
    ]
    assert kept == sorted(kept)
    assert kept[-1] > 1.1 * kept[0]


def test_parts_are_runs_of_layers() -> None:
    geometry = Geometry(5, 2, 3, 4, ((0, 5),))
    first, second = part_elements(geometry, 0, "kv", 2)
    assert first.tolist() == [*range(12), *range(30, 46)]
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(70))
    assert len(part_elements(geometry, 0, "v", 9)) == 5
    assert [part.tolist() for part in part_elements(geometry, 0, "k", 1)] == [list(range(30))]


def test_rows_that_are_not_finite() -> None:
    bad = torch.full((4, P), float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        fit_in_parts(Rows.of(bad), parts(), 4, rank_cap=4)
