"""Mean and principal directions of a matrix of rows.

`eigh`: float64 eigendecomposition of the covariance, exact, for rows up to a few
thousand elements. `rsvd`: randomised subspace iteration (Halko, Martinsson and
Tropp 2011, algorithm 4.4, applied to the Gram matrix), for longer rows. Rows
stay where they are; blocks of them visit the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Method = Literal["auto", "eigh", "rsvd"]

EIGH_LIMIT = 4096
"""Longest row for which "auto" chooses eigh."""

RANK_CAP = 10_000
"""Largest number of directions kept by default (the paper's for 8B to 70B models)."""

OVERSAMPLING = 32
POWER_ITERATIONS = 8
"""The paper's count; it says nothing about oversampling."""

_BLOCK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class PrincipalBasis:
    """mean: float32 [p]. basis: float32 [p, r], orthonormal columns by falling variance.

    variance: float64 [r], mean square of each coefficient. total_variance: the
    same summed over all p dimensions. method: "eigh" or "rsvd". All on the CPU.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    variance: torch.Tensor
    total_variance: float
    method: str


def resolve_method(method: Method, row_size: int) -> Literal["eigh", "rsvd"]:
    """Turn "auto" into the method used for this row length."""
    if method == "auto":
        return "eigh" if row_size <= EIGH_LIMIT else "rsvd"
    if method not in ("eigh", "rsvd"):
        raise ValueError(f'method "{method}" is not one of auto, eigh, rsvd')
    return method


def effective_rank(rows: int, row_size: int, rank_cap: int = RANK_CAP) -> int:
    """Directions that a fit can have: centred rows span at most rows - 1 dimensions."""
    return max(1, min(row_size, rows - 1, rank_cap))


def peak_bytes(rows: int, row_size: int, method: Method = "auto", rank_cap: int = RANK_CAP) -> int:
    """Estimate of the device memory that `fit_basis` needs besides the rows, in bytes."""
    block = _block_rows(rows, row_size)
    if resolve_method(method, row_size) == "eigh":
        # Covariance, eigenvectors and LAPACK's workspace (2 p^2), all float64.
        return 4 * row_size**2 * 8 + block * row_size * (4 + 8)
    width = min(row_size, effective_rank(rows, row_size, rank_cap) + OVERSAMPLING)
    # Subspace, its image, QR's copy; the small eigenproblem; one block and its projection.
    return 4 * (4 * row_size * width + 6 * width**2 + 2 * block * (row_size + width))


def fit_basis(
    rows: torch.Tensor,
    *,
    method: Method = "auto",
    rank_cap: int = RANK_CAP,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PrincipalBasis:
    """Principal directions of rows.

    rows: float32 [n, p], n >= 2, on any device. Of each direction the entry of
    largest magnitude is positive, so the result does not depend on the signs a
    solver happens to return. Raises ValueError for fewer than two rows, a row
    that is not finite, or an unknown method.
    """
    if rows.dim() != 2 or rows.shape[0] < 2:
        raise ValueError(f"rows have shape {tuple(rows.shape)}; PCA needs [n, p] with n >= 2")
    count, row_size = rows.shape
    chosen = resolve_method(method, row_size)
    rank = effective_rank(count, row_size, rank_cap)
    where = torch.device(device)
    mean = _mean(rows, where)
    if not bool(torch.isfinite(mean).all()):
        raise ValueError("rows contain NaN or infinity; PCA needs finite rows")
    if chosen == "eigh":
        basis, variance, total = _eigh(rows, mean, rank, where)
    else:
        basis, variance, total = _randomised(rows, mean, rank, where, seed)
    basis = _fix_signs(basis)
    return PrincipalBasis(
        mean=mean.float().cpu(),
        basis=basis.float().cpu().contiguous(),
        variance=variance.double().cpu(),
        total_variance=total,
        method=chosen,
    )


def _block_rows(rows: int, row_size: int) -> int:
    return max(1, min(rows, _BLOCK_BYTES // (8 * row_size)))


def _mean(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """float64 [p] on the device."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=device)
    for block in rows.split(_block_rows(*rows.shape)):
        total += block.to(device).double().sum(dim=0)
    return total / rows.shape[0]


def _eigh(
    rows: torch.Tensor, mean: torch.Tensor, rank: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, float]:
    row_size = rows.shape[1]
    covariance = torch.zeros(row_size, row_size, dtype=torch.float64, device=device)
    for block in rows.split(_block_rows(*rows.shape)):
        centred = block.to(device).double() - mean
        covariance.addmm_(centred.T, centred)
    covariance /= rows.shape[0]
    total = float(covariance.diagonal().sum())
    values, vectors = torch.linalg.eigh(covariance)
    return vectors.flip(1)[:, :rank], values.flip(0)[:rank].clamp_min(0.0), total


def _randomised(
    rows: torch.Tensor, mean: torch.Tensor, rank: int, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Subspace iteration Z <- orth(A^T A Z), one pass over the rows an iteration."""
    count, row_size = rows.shape
    centre = mean.float()
    width = min(row_size, rank + OVERSAMPLING)
    # Drawn on the CPU so that the start does not depend on the device.
    generator = torch.Generator().manual_seed(seed)
    subspace = torch.randn(row_size, width, generator=generator).to(device)
    for _ in range(POWER_ITERATIONS + 1):
        image = torch.zeros_like(subspace)
        for block in rows.split(_block_rows(count, row_size)):
            centred = block.to(device).float() - centre
            image.addmm_(centred.T, centred @ subspace)
        subspace = torch.linalg.qr(image).Q
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    total = 0.0
    for block in rows.split(_block_rows(count, row_size)):
        centred = block.to(device).float() - centre
        projected = (centred @ subspace).double()
        gram.addmm_(projected.T, projected)
        total += float(centred.double().square().sum())
    values, vectors = torch.linalg.eigh(gram / count)
    basis = subspace @ vectors.flip(1)[:, :rank].float()
    return basis, values.flip(0)[:rank].clamp_min(0.0), total / count


def _fix_signs(basis: torch.Tensor) -> torch.Tensor:
    largest = basis.abs().argmax(dim=0, keepdim=True)
    signs = torch.sign(basis.gather(0, largest))
    return basis * torch.where(signs == 0, torch.ones_like(signs), signs)
