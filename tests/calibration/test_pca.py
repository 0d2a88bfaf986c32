from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from kvtc_vllm.calibration import pca, solvers

SOLVERS: tuple[solvers.Solver, ...] = get_args(solvers.Solver)


def rows(count: int = 400, p: int = 60, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(p, p, generator=generator)).Q
    spectrum = torch.logspace(1, -2, p)
    return torch.randn(count, p, generator=generator) * spectrum @ directions.T + 3.0


def test_eigh_equals_numpy_svd() -> None:
    x = rows()
    fitted = pca.fit_basis(x, method="eigh")
    centred = x.double().numpy() - x.double().numpy().mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    assert torch.allclose(fitted.mean, x.mean(dim=0), atol=1e-5)
    np.testing.assert_allclose(fitted.variance.numpy(), singular**2 / len(x), rtol=1e-6)
    aligned = np.abs(np.sum(fitted.basis.double().numpy() * directions.T, axis=0))
    np.testing.assert_allclose(aligned, 1.0, atol=1e-5)
    assert fitted.total_variance == pytest.approx(float((singular**2).sum()) / len(x))


@pytest.mark.parametrize("method", ["subspace", "rsvd"])
@pytest.mark.parametrize("rank", [8, 30])
def test_iterating_is_close_to_exact(rank: int, method: solvers.Method) -> None:
    x = rows(600, 150)
    exact = pca.fit_basis(x, method="eigh", rank_cap=rank)
    random = pca.fit_basis(x, method=method, rank_cap=rank)
    assert random.basis.shape == exact.basis.shape == (150, rank)
    assert random.total_variance == pytest.approx(exact.total_variance, rel=1e-5)
    torch.testing.assert_close(random.variance, exact.variance, rtol=1e-3, atol=0)
    captured = (exact.basis.T @ random.basis).square().sum()
    assert float(captured) == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("method", SOLVERS)
def test_orthonormal_signed_and_repeatable(method: solvers.Method) -> None:
    x = rows()
    first = pca.fit_basis(x, method=method, rank_cap=20, seed=3)
    again = pca.fit_basis(x, method=method, rank_cap=20, seed=3)
    assert torch.equal(first.basis, again.basis)
    torch.testing.assert_close(first.basis.T @ first.basis, torch.eye(20), atol=1e-5, rtol=0)
    largest = first.basis.gather(0, first.basis.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())
    assert bool((first.variance.diff() <= 0).all())


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows()
    whole = pca.fit_basis(x, method="eigh")
    monkeypatch.setattr(solvers, "_BLOCK_BYTES", 8 * 60 * 37)
    blocks = pca.fit_basis(x, method="eigh")
    torch.testing.assert_close(blocks.basis, whole.basis, atol=1e-5, rtol=1e-4)


def test_rank_is_bounded_by_rows() -> None:
    assert solvers.effective_rank(10, 60) == 9
    assert pca.fit_basis(rows(10), method="eigh").basis.shape == (60, 9)
    assert solvers.effective_rank(10**6, 60, rank_cap=50) == 50


@pytest.mark.parametrize(
    ("rows", "row_size", "rank", "best"),
    [
        # SmolLM2-135M, plans for 8x and up, and for 64x alone.
        (60_000, 5760, 5671, "eigh"),
        (60_000, 5760, 708, "subspace"),
        # Llama 3.1 8B, all heads: with the paper's cap, and for 64x alone.
        (160_000, 32_768, 10_000, "eigh"),
        (160_000, 32_768, 4033, "subspace"),
        # Few directions of long rows: a covariance costs more than all iterations.
        (20_000, 81_920, 200, "rsvd"),
    ],
)
def test_auto_is_the_cheapest_by_prediction(
    rows: int, row_size: int, rank: int, best: solvers.Solver
) -> None:
    assert solvers.resolve_method("auto", rows, row_size, rank) == best
    seconds = {s: solvers.predicted_seconds(rows, row_size, s, rank) for s in SOLVERS}
    assert seconds[best] == min(seconds.values())


def test_auto_fits_the_memory() -> None:
    arguments = (160_000, 81_920, 10_000, "cuda")
    assert solvers.resolve_method("auto", *arguments) == "subspace"
    assert solvers.resolve_method("auto", *arguments, 24 * 2**30) == "rsvd"


def test_peak_bytes_grows_with_the_row() -> None:
    assert solvers.peak_bytes(10_000, 1024, "eigh", 1024) < 200 * 2**20
    for solver in ("subspace", "rsvd"):
        assert 2 * 2**30 < solvers.peak_bytes(160_000, 32_768, solver, 10_000) < 16 * 2**30


def test_bad_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="n >= 2"):
        pca.fit_basis(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="finite"):
        pca.fit_basis(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="method"):
        pca.fit_basis(torch.zeros(2, 4), method="svd")  # type: ignore[arg-type]
