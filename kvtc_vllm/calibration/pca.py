"""Mean and principal directions of a matrix of rows, by one of three solvers.

`eigh`: eigendecomposition of the covariance. Exact.
`subspace`: subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) on the
covariance, for a rank well below the row length.
`rsvd`: the same iteration on the rows, which multiplies all of them in every iteration. For rows
so long that their covariance does not fit, or costs more than that.

`kvtc_vllm.calibration.solvers` chooses. Rows come in blocks, and blocks visit the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kvtc_vllm.calibration.solvers import (
    ITERATIONS,
    RANK_CAP,
    Method,
    Solver,
    block_rows,
    device_memory,
    effective_rank,
    iteration_width,
    product_dtype,
    resolve_method,
)

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total); stages: mean, covariance, eigh, iterate."""

_PANELS = 8
"""Of a covariance only the panels on and above the diagonal are multiplied: 9/16 of the work."""


@dataclass(frozen=True)
class Rows:
    """Rows that need not be in memory.

    count: n, at least 2.
    row_size: p.
    blocks: starts a pass over all rows: float32 [b, p] each, on any device, in the same order
    every time.
    """

    count: int
    row_size: int
    blocks: Callable[[], Iterator[torch.Tensor]]

    @classmethod
    def of(cls, rows: torch.Tensor) -> Rows:
        """Rows in memory: [n, p]. Raises ValueError for another shape."""
        if rows.dim() != 2:
            raise ValueError(f"rows have shape {tuple(rows.shape)}; PCA needs [n, p] with n >= 2")
        count, row_size = rows.shape
        return cls(count, row_size, lambda: iter(rows.split(block_rows(count, row_size))))


@dataclass(frozen=True)
class PrincipalBasis:
    """Mean and leading directions, on the CPU.

    mean: float32 [p].
    basis: float32 [p, r], orthonormal columns by falling variance.
    variance: float64 [r], mean square of each coefficient.
    total_variance: the same summed over all p dimensions.
    method: the solver that was used.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    variance: torch.Tensor
    total_variance: float
    method: Solver


def fit_basis(
    rows: torch.Tensor | Rows,
    *,
    method: Method = "auto",
    rank_cap: int = RANK_CAP,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> PrincipalBasis:
    """Principal directions of rows.

    rows: float32 [n, p], n >= 2, on any device, or in blocks. Of each direction the entry of
    largest magnitude is positive, so the result does not depend on the signs a
    solver happens to return. Raises ValueError for fewer than two rows, a row
    that is not finite, or an unknown method.
    """
    source = Rows.of(rows) if isinstance(rows, torch.Tensor) else rows
    if source.count < 2:
        raise ValueError(f"there are {source.count} rows; PCA needs [n, p] with n >= 2")
    where = torch.device(device)
    rank = effective_rank(source.count, source.row_size, rank_cap)
    solver = resolve_method(
        method, source.count, source.row_size, rank, where.type, device_memory(where)
    )
    report = progress or (lambda stage, done, total: None)
    if solver == "rsvd":
        mean = rows_mean(source, where, report)
        basis, variance, total = _iterate_rows(source, mean, rank, where, seed, report)
    else:
        mean, covariance = _covariance(source, where, report)
        total = float(covariance.diagonal().double().sum())
        if solver == "eigh":
            # One call, whose steps cannot be seen.
            report("eigh", 0, 1)
            values, vectors = torch.linalg.eigh(covariance)
            # Rows are long: each of these holds p^2 elements.
            del covariance
            basis, variance = vectors[:, -rank:].flip(1), values.flip(0)[:rank]
            del vectors
        else:
            basis, variance = _iterate_covariance(covariance, rank, seed, report)
    return PrincipalBasis(
        mean=mean.float().cpu(),
        basis=fix_signs(basis).float().cpu().contiguous(),
        variance=variance.clamp_min(0.0).double().cpu(),
        total_variance=total,
        method=solver,
    )


def _check_finite(mean: torch.Tensor) -> None:
    if not bool(torch.isfinite(mean).all()):
        raise ValueError("rows contain NaN or infinity; PCA needs finite rows")


def rows_mean(rows: Rows, device: torch.device, report: Progress) -> torch.Tensor:
    """float64 [p] on the device."""
    total = torch.zeros(rows.row_size, dtype=torch.float64, device=device)
    done = 0
    report("mean", done, rows.count)
    for block in rows.blocks():
        total += block.to(device).double().sum(dim=0)
        done += len(block)
        report("mean", done, rows.count)
    mean = total / rows.count
    _check_finite(mean)
    return mean


def _covariance(
    rows: Rows, device: torch.device, report: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean, float64 [p], and covariance [p, p] of one pass over the rows."""
    row_size = rows.row_size
    dtype = product_dtype(row_size)
    total = torch.zeros(row_size, dtype=torch.float64, device=device)
    products = torch.zeros(row_size, row_size, dtype=dtype, device=device)
    shift = torch.zeros(row_size, dtype=dtype, device=device)
    panels = _panels(row_size)
    done = 0
    report("covariance", done, rows.count)
    for block in rows.blocks():
        held = block.to(device)
        if done == 0:
            # A large mean would cost digits of the products. The first rows' is near enough.
            shift = held.mean(dim=0).to(dtype)
        centred = held - shift
        total += centred.sum(dim=0, dtype=torch.float64)
        for first, end in panels:
            products[first:end, first:].addmm_(centred[:, first:end].T, centred[:, first:])
        done += len(block)
        report("covariance", done, rows.count)
    offset = total / rows.count
    _check_finite(offset)
    products /= rows.count
    products.addr_(offset.to(dtype), offset.to(dtype), alpha=-1.0)
    for first, end in panels:
        products[end:, first:end] = products[first:end, end:].T
    return shift.double() + offset, products


def _panels(row_size: int) -> list[tuple[int, int]]:
    step = -(-row_size // _PANELS)
    return [(first, min(first + step, row_size)) for first in range(0, row_size, step)]


def _iterate(
    multiply: Callable[[torch.Tensor], torch.Tensor],
    row_size: int,
    width: int,
    device: torch.device,
    seed: int,
    report: Progress,
) -> torch.Tensor:
    """Subspace iteration Z <- orth(C Z): orthonormal float32 [p, width]. multiply: Z -> C Z."""
    # Drawn on the CPU so that the start does not depend on the device.
    generator = torch.Generator().manual_seed(seed)
    subspace = torch.randn(row_size, width, generator=generator).to(device)
    for done in range(ITERATIONS):
        report("iterate", done, ITERATIONS)
        subspace = torch.linalg.qr(multiply(subspace)).Q
    report("iterate", ITERATIONS, ITERATIONS)
    return subspace


def _leading(
    subspace: torch.Tensor, products: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading directions within a subspace. products: covariance of its coefficients, float64."""
    values, vectors = torch.linalg.eigh(products)
    return subspace @ vectors.flip(1)[:, :rank].float(), values.flip(0)[:rank]


def _iterate_covariance(
    covariance: torch.Tensor, rank: int, seed: int, report: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    row_size = len(covariance)
    single = covariance.float()
    subspace = _iterate(
        lambda z: single @ z,
        row_size,
        iteration_width(row_size, rank),
        covariance.device,
        seed,
        report,
    )
    return _leading(subspace, (subspace.T @ (single @ subspace)).double(), rank)


def _iterate_rows(
    rows: Rows, mean: torch.Tensor, rank: int, device: torch.device, seed: int, report: Progress
) -> tuple[torch.Tensor, torch.Tensor, float]:
    centre = mean.float()

    def multiply(subspace: torch.Tensor) -> torch.Tensor:
        image = torch.zeros_like(subspace)
        for block in rows.blocks():
            centred = block.to(device).float() - centre
            image.addmm_(centred.T, centred @ subspace)
        return image

    width = iteration_width(rows.row_size, rank)
    subspace = _iterate(multiply, rows.row_size, width, device, seed, report)
    products = torch.zeros(width, width, dtype=torch.float64, device=device)
    total = 0.0
    for block in rows.blocks():
        centred = block.to(device).float() - centre
        projected = (centred @ subspace).double()
        products.addmm_(projected.T, projected)
        total += float(centred.double().square().sum())
    basis, variance = _leading(subspace, products / rows.count, rank)
    return basis, variance, total / rows.count


def fix_signs(basis: torch.Tensor) -> torch.Tensor:
    """In place: of each column the entry of largest magnitude becomes positive."""
    largest = basis.abs().argmax(dim=0, keepdim=True)
    signs = torch.sign(basis.gather(0, largest))
    return basis.mul_(torch.where(signs == 0, torch.ones_like(signs), signs))
