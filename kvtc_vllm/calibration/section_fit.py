"""Fitting one section, in three steps: mean and basis, a table of plans, held-out errors.

The steps are apart because K and V of a layer group may have to divide one budget of bits, which
takes the tables of both. The basis is rounded to float16, as it will be stored, before the
allocation sees a coefficient, so plans and errors are those of the artifact itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from kvtc_vllm.calibration.allocation import make_table
from kvtc_vllm.calibration.fit_settings import FitSettings, choose_solver
from kvtc_vllm.calibration.parts import fit_in_parts, part_elements
from kvtc_vllm.calibration.pca import PrincipalBasis, Rows, fit_basis
from kvtc_vllm.calibration.solvers import Solver, block_rows
from kvtc_vllm.calibration.step_classes import Sample
from kvtc_vllm.codec.artifact import Geometry, Kind, SectionBasis, SectionName
from kvtc_vllm.codec.bitplan import AllocationTable
from kvtc_vllm.codec.section_coder import SectionCoder
from kvtc_vllm.codec.transform import centred_rows, from_coefficients, to_coefficients

SectionProgress = Callable[[str, str, int, int], None]
"""Called as (section such as "k0" or "kv0", stage, done, total); stages: those of `pca.Progress`,
sample, simulate, allocate, held-out."""

_HELDOUT_BYTES = 16 * 2**20

Plan = TypeVar("Plan", bound=SectionCoder)
Through = Callable[[torch.Tensor, Plan], torch.Tensor]
"""Coefficients float32 [n, rank] as a plan restores them from what it stores."""


class RowSource(Protocol):
    """Where rows come from: `kvtc_vllm.calibration.rows.CapturedRows`."""

    positions: torch.Tensor
    docs: torch.Tensor

    def cache_rows(self, kind: Kind, index: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """K or V of the indexed tokens, layers first .. end - 1, as in the cache: [n, l, H, D]."""
        ...

    def count(self, *, heldout: bool) -> int:
        """Number of training or held-out rows."""
        ...

    def select(
        self,
        *,
        heldout: bool,
        limit: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Numbers of training or held-out rows, rising: int64 [n]. At most `limit`, drawn."""
        ...

    def take(self, group: int, name: SectionName, index: torch.Tensor) -> torch.Tensor:
        """The rows of these numbers, of one layer group: float32 [n, p], new; K pre-RoPE."""
        ...


@dataclass(frozen=True)
class SectionFit:
    """What the report says about one section besides the artifact.

    variance: float64 [r], falling, of weighted rows.
    total_variance: over all p dimensions.
    orthonormality_defect: largest entry of |V^T V - I| of the stored basis.
    method: the solver.
    train_rows, heldout_rows: rows used.
    seconds: of the whole section.
    plain_error: target ratio -> held-out error of rows without their weights; None: there are
    none, and the artifact's own held-out error is that.
    """

    variance: torch.Tensor
    total_variance: float
    orthonormality_defect: float
    method: str
    train_rows: int
    heldout_rows: int
    seconds: float
    plain_error: Mapping[float, float] | None = None


class SectionFitter:
    """K, V or both of one layer group, in the middle of its fit.

    Raises what `fit_basis` does. progress: see `SectionProgress`.
    """

    def __init__(
        self,
        source: RowSource,
        geometry: Geometry,
        group: int,
        name: SectionName,
        lowest_ratio: float,
        settings: FitSettings,
        progress: SectionProgress | None,
    ) -> None:
        self._started = time.monotonic()
        self._source = source
        self._group = group
        self._name: SectionName = name
        self._settings = settings
        self._progress = progress
        self._device = torch.device(settings.device)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._weights: torch.Tensor | None = None
        if settings.weights is not None:
            self._weights = settings.weights.of_row(geometry, group, name)
        index = source.select(heldout=False, limit=settings.train_rows, generator=self._generator)
        self._train_rows = len(index)
        self.row_size = geometry.row_size(group, name)
        self._parts = part_elements(geometry, group, name, settings.parts)
        self._solver, rank = choose_solver(len(index), self.row_size, lowest_ratio, settings)
        principal = self._fit_basis(index, rank)
        self._variance, self._total_variance = principal.variance, principal.total_variance
        self._method = principal.method
        mean = principal.mean if self._weights is None else principal.mean / self._weights
        weights = None if self._weights is None else self._weights.to(self._device)
        self._full = SectionBasis(
            mean.to(self._device), principal.basis.half().to(self._device), {}, weights=weights
        )
        # By far the largest thing here.
        del principal
        drawn = torch.randperm(len(index), generator=self._generator)[: settings.simulation_rows]
        self._sample_index = index[drawn]

    @property
    def basis(self) -> SectionBasis:
        """Mean, weights and all columns that were fitted, on the device of the fit; no plans."""
        return self._full

    def table(self, budgets: Sequence[int]) -> AllocationTable:
        """Plans for every budget up to the largest of these, in bits per row."""
        self._report("sample", 0, 1)
        sample = self._source.take(self._group, self._name, self._sample_index).to(self._device)
        return make_table(self._full, self._variance, sample, budgets, self._settings, self._report)

    def sample(self, index: torch.Tensor) -> Sample:
        """The coefficients of rows of these numbers, on all columns of the basis."""
        rows = self._source.take(self._group, self._name, index).to(self._device)
        coefficients = to_coefficients(rows, self._full, self._full.basis.shape[1])
        total = float(centred_rows(rows, self._full).double().square().sum())
        inside = float(coefficients.double().square().sum())
        return Sample(coefficients.cpu(), max(0.0, total - inside), self.row_size)

    def finish(
        self, plans: Mapping[float, Plan], through: Through[Plan]
    ) -> tuple[SectionBasis, SectionFit]:
        """The section with these plans and their held-out errors. To be called once, last."""
        rank = max(1, *(plan.total_rank for plan in plans.values()))
        full = self._full
        stored = full.basis[:, :rank].contiguous()
        # In the type of the product, or every block would convert it.
        trimmed = SectionBasis(full.mean, stored.float(), plans, weights=full.weights)
        del full, self._full
        unseen = self._source.select(
            heldout=True, limit=self._settings.heldout_rows, generator=self._generator
        )
        errors = heldout_errors(trimmed, plans, self._unseen_blocks(unseen), through)
        section = SectionBasis(
            mean=trimmed.mean.cpu(),
            basis=stored.cpu(),
            plans=plans,
            heldout_error=errors.weighted,
            weights=self._weights,
        )
        detail = SectionFit(
            variance=self._variance,
            total_variance=self._total_variance,
            orthonormality_defect=orthonormality_defect(section.basis),
            method=self._method,
            train_rows=self._train_rows,
            heldout_rows=len(unseen),
            seconds=time.monotonic() - self._started,
            plain_error=None if self._weights is None else errors.plain,
        )
        return section, detail

    def _fit_basis(self, index: torch.Tensor, rank: int) -> PrincipalBasis:
        count = len(index)
        size = block_rows(count, self.row_size)
        rows = Rows(count, self.row_size, lambda: map(self._weighted_rows, index.split(size)))
        if len(self._parts) > 1:
            return fit_in_parts(
                rows,
                self._parts,
                max(1, round(self._settings.turned * self.row_size)),
                rank_cap=rank,
                device=self._device,
                progress=self._report,
            )
        solver: Solver = self._solver
        # Only this one passes over the rows more often than twice.
        return fit_basis(
            self._weighted_rows(index) if solver == "rsvd" else rows,
            method=solver,
            rank_cap=rank,
            device=self._device,
            seed=self._settings.seed,
            progress=self._report,
        )

    def _weighted_rows(self, index: torch.Tensor) -> torch.Tensor:
        rows = self._source.take(self._group, self._name, index)
        return rows if self._weights is None else rows.mul_(self._weights)

    def _unseen_blocks(self, index: torch.Tensor) -> Iterator[torch.Tensor]:
        done = 0
        for part in index.split(max(1, _HELDOUT_BYTES // (4 * self.row_size))):
            block = self._source.take(self._group, self._name, part)
            self._report("held-out", done, len(index))
            yield block.to(self._device)
            done += len(block)

    def _report(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(f"{self._name}{self._group}", stage, done, total)


@dataclass(frozen=True)
class HeldoutErrors:
    """Target ratio -> relative squared error; 0 for rows without variance.

    weighted: of rows times the section's weights, the domain that plans are made in. plain: of
    rows as they are.
    """

    weighted: dict[float, float]
    plain: dict[float, float]


def heldout_errors(
    section: SectionBasis,
    plans: Mapping[float, Plan],
    blocks: Iterable[torch.Tensor],
    through: Through[Plan],
) -> HeldoutErrors:
    """Errors of rows through project, quantise, dequantise, reconstruct.

    blocks: float32 [b, p] each, on the device to use. through: see `Through`.
    """
    squared = {ratio: [0.0, 0.0] for ratio in plans}
    totals = [0.0, 0.0]
    rank = max(plan.rank for plan in plans.values())

    def energies(difference: torch.Tensor) -> tuple[float, float]:
        """Weighted and plain; difference is overwritten."""
        plain = float(difference.double().square().sum())
        if section.weights is None:
            return plain, plain
        difference *= section.weights.to(difference.device)
        return float(difference.double().square().sum()), plain

    for block in blocks:
        for i, energy in enumerate(energies(block - section.mean.to(block.device))):
            totals[i] += energy
        coefficients = to_coefficients(block, section, rank)
        for ratio, plan in plans.items():
            restored = from_coefficients(through(coefficients[:, : plan.rank], plan), section)
            for i, energy in enumerate(energies(block - restored)):
                squared[ratio][i] += energy
    weighted, plain = (
        {ratio: error[i] / totals[i] if totals[i] > 0 else 0.0 for ratio, error in squared.items()}
        for i in range(2)
    )
    return HeldoutErrors(weighted, plain)


def orthonormality_defect(basis: torch.Tensor) -> float:
    """Largest entry of |V^T V - I|. basis: [p, r], any float dtype."""
    columns = basis.float()
    gram = columns.T @ columns
    gram.diagonal().sub_(1.0)
    return float(gram.abs().max())
