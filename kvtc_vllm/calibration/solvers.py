"""Which PCA solver to use: predicted cost and memory of each.

The choice depends on sizes and on the kind of device alone, so that the same command makes the
same artifact on every machine of a kind.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Solver = Literal["eigh", "subspace", "rsvd"]
Method = Literal["auto", "eigh", "subspace", "rsvd"]

RANK_CAP = 10_000
"""Largest number of directions kept by default (the paper's for 8B to 70B models)."""

OVERSAMPLING = 32
ITERATIONS = 9
"""One and the paper's count of eight; it says nothing about oversampling."""

DOUBLE_LIMIT = 2048
"""Longest row whose covariance is summed and decomposed in float64.

Longer ones are in float32, which takes a third of the time and half the memory. On keys of
SmolLM2-135M (rows of 5,760) the columns are orthonormal to 2e-6 and capture the same variance to
4e-7. Rounding the stored basis to float16 costs more.
"""

USABLE_MEMORY = 0.8
"""Part of a device's memory that a solver may plan with."""

_BLOCK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second.

    product, product64: of matrix products in float32 and float64.
    eigh, eigh64: of `torch.linalg.eigh`, counted as 9 p^3.
    qr: of `torch.linalg.qr` in float32 with Q, counted as 4 p w^2.
    """

    product: float
    product64: float
    eigh: float
    eigh64: float
    qr: float


RATES = {
    # Measured on keys of SmolLM2-135M (p = 5760), per core of a Xeon with AVX-512.
    "cpu": Rates(product=158e9, product64=79e9, eigh=185e9, eigh64=52e9, qr=120e9),
    # Not measured. Products: what the paper's 86 s for 160,000 rows on an H100 come to.
    "cuda": Rates(product=30e12, product64=15e12, eigh=1e12, eigh64=0.5e12, qr=4e12),
}


def resolve_method(
    method: Method,
    rows: int,
    row_size: int,
    rank: int,
    device_type: str = "cpu",
    memory: float = float("inf"),
) -> Solver:
    """The solver that a method stands for: of "auto" the fastest that fits.

    rows: n. row_size: p. rank: directions wanted. memory: bytes on the device; if nothing fits,
    the solver that needs least. Raises ValueError for an unknown method.
    """
    if method not in get_args(Method):
        raise ValueError(f'method "{method}" is not one of {", ".join(get_args(Method))}')
    if method != "auto":
        return method

    def bytes_of(solver: Solver) -> int:
        return peak_bytes(rows, row_size, solver, rank)

    fitting = [s for s in get_args(Solver) if bytes_of(s) <= USABLE_MEMORY * memory]
    if not fitting:
        return min(get_args(Solver), key=bytes_of)
    return min(fitting, key=lambda s: predicted_seconds(rows, row_size, s, rank, device_type))


def predicted_seconds(
    rows: int, row_size: int, solver: Solver, rank: int, device_type: str = "cpu"
) -> float:
    """Time of `fit_basis` on one core or GPU at `RATES`, reading the rows left out."""
    rates = RATES.get(device_type, RATES["cpu"])
    width = iteration_width(row_size, rank)
    double = product_dtype(row_size) == torch.float64
    covariance = 9 / 8 * rows * row_size**2 / (rates.product64 if double else rates.product)
    if solver == "eigh":
        return covariance + 9 * row_size**3 / (rates.eigh64 if double else rates.eigh)
    orthogonal = ITERATIONS * 4 * row_size * width**2 / rates.qr + 9 * width**3 / rates.eigh64
    if solver == "subspace":
        return covariance + (ITERATIONS + 1) * 2 * row_size**2 * width / rates.product + orthogonal
    return (ITERATIONS + 0.5) * 4 * rows * row_size * width / rates.product + orthogonal


def peak_bytes(rows: int, row_size: int, solver: Solver, rank: int) -> int:
    """Device memory that `fit_basis` needs besides rows that are held, in bytes."""
    block = block_rows(rows, row_size)
    width = iteration_width(row_size, rank)
    itemsize = product_dtype(row_size).itemsize
    summing = row_size**2 * itemsize + block * row_size * (4 + itemsize)
    if solver == "eigh":
        # Covariance, eigenvectors and LAPACK's workspace, or two more copies of the basis.
        return max(4 * row_size**2 * itemsize, summing)
    # Subspace, its image, QR's copy and Q; the small eigenproblem.
    iterating = 4 * 4 * row_size * width + 8 * 4 * width**2
    if solver == "subspace":
        single = 0 if itemsize == 4 else 4
        return max(row_size**2 * (itemsize + single) + iterating, summing)
    return iterating + 4 * 2 * block * (row_size + width)


def effective_rank(rows: int, row_size: int, rank_cap: int = RANK_CAP) -> int:
    """Directions that a fit can have: centred rows span at most rows - 1 dimensions."""
    return max(1, min(row_size, rows - 1, rank_cap))


def iteration_width(row_size: int, rank: int) -> int:
    """Columns of the subspace that is iterated."""
    return min(row_size, rank + OVERSAMPLING)


def product_dtype(row_size: int) -> torch.dtype:
    """What a covariance is summed in, see `DOUBLE_LIMIT`."""
    return torch.float64 if row_size <= DOUBLE_LIMIT else torch.float32


def block_rows(rows: int, row_size: int) -> int:
    """Rows per block."""
    return max(1, min(rows, _BLOCK_BYTES // (8 * row_size)))


def device_memory(device: torch.device) -> float:
    """Bytes of a GPU's memory, or of the host's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
