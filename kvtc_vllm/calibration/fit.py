"""Fitting one rank: rows -> mean, basis, plans and their held-out error.

The basis is rounded to float16, as it will be stored, before the allocation
sees a coefficient, so plans and errors are those of the artifact itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvtc_vllm.artifact.fingerprint import artifact_fingerprint
from kvtc_vllm.calibration.allocation import make_plans
from kvtc_vllm.calibration.fit_settings import FitSettings, choose_solver, own_ratios
from kvtc_vllm.calibration.pca import Rows, fit_basis
from kvtc_vllm.calibration.solvers import block_rows
from kvtc_vllm.codec.artifact import KINDS, Geometry, Kind, RankArtifact, SectionBasis
from kvtc_vllm.codec.bitplan import apply_plan
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.payload import BitPlan
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.transform import from_coefficients, to_coefficients

SectionProgress = Callable[[str, str, int, int], None]
"""Called as (section such as "k0", stage, done, total); stages: those of `pca.Progress`, sample,
simulate, allocate, held-out."""

_HELDOUT_BYTES = 16 * 2**20


class RowSource(Protocol):
    """Where rows come from: `kvtc_vllm.calibration.rows.CapturedRows`."""

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

    def take(self, group: int, kind: Kind, index: torch.Tensor) -> torch.Tensor:
        """The rows of these numbers, of one layer group: float32 [n, p]; K pre-RoPE."""
        ...


@dataclass(frozen=True)
class SectionFit:
    """What the report says about one section besides the artifact.

    variance: float64 [r], falling.
    total_variance: over all p dimensions.
    orthonormality_defect: largest entry of |V^T V - I| of the stored basis.
    method: the solver.
    train_rows, heldout_rows: rows used.
    seconds: of the whole section.
    """

    variance: torch.Tensor
    total_variance: float
    orthonormality_defect: float
    method: str
    train_rows: int
    heldout_rows: int
    seconds: float


@dataclass(frozen=True)
class RankFit:
    """A fitted rank and how the fit went.

    artifact: with a fingerprint, ready to be written.
    sections: one per section of the artifact.
    seconds: of the whole fit.
    key_share: see `FitSettings`.
    """

    artifact: RankArtifact
    sections: dict[tuple[int, Kind], SectionFit]
    seconds: float
    key_share: float | None = None


def fit_rank(
    source: RowSource,
    geometry: Geometry,
    ropes: tuple[Rope, ...],
    layer_rope: tuple[int | None, ...],
    ratios: Sequence[float],
    *,
    sink_tokens: int = 4,
    settings: FitSettings | None = None,
    progress: SectionProgress | None = None,
) -> RankFit:
    """Fit every section of one rank.

    ratios: target ratios of K and V together, one plan each. `estimate_fit` tells the
    peak memory beforehand. Raises ArtifactError if training or held-out rows
    are missing or the key share does not go with the ratios, ValueError for other
    settings out of range.
    """
    settings = settings or FitSettings()
    started = time.monotonic()
    available = source.count(heldout=False)
    train_rows = min(available, settings.train_rows or available)
    if train_rows < 2 or source.count(heldout=True) < 1:
        raise ArtifactError(
            f"{available} training and {source.count(heldout=True)} held-out rows; "
            "a fit needs at least 2 and 1"
        )
    sections: dict[tuple[int, Kind], SectionBasis] = {}
    details: dict[tuple[int, Kind], SectionFit] = {}
    for group in range(len(geometry.layer_groups)):
        for kind in KINDS:
            own = own_ratios(geometry, group, kind, ratios, settings)
            section, detail = _fit_section(source, geometry, group, kind, own, settings, progress)
            sections[group, kind] = section
            details[group, kind] = detail
    artifact = RankArtifact(
        geometry=geometry,
        sections=sections,
        ropes=ropes,
        layer_rope=layer_rope,
        fingerprint=artifact_fingerprint(geometry, sections, sink_tokens),
        sink_tokens=sink_tokens,
    )
    return RankFit(artifact, details, time.monotonic() - started, settings.key_share)


def heldout_errors(
    section: SectionBasis, plans: Mapping[float, BitPlan], blocks: Iterable[torch.Tensor]
) -> dict[float, float]:
    """Relative squared error of rows through project, quantise, dequantise, reconstruct.

    blocks: float32 [b, p] each, on the device to use. Returns target ratio -> error; 0 for rows
    without variance.
    """
    errors = dict.fromkeys(plans, 0.0)
    total = 0.0
    rank = max(plan.rank for plan in plans.values())
    for block in blocks:
        mean = section.mean.to(block.device)
        total += float((block - mean).double().square().sum())
        coefficients = to_coefficients(block, section, rank)
        for ratio, plan in plans.items():
            restored = from_coefficients(apply_plan(coefficients[:, : plan.rank], plan), section)
            errors[ratio] += float((block - restored).double().square().sum())
    return {ratio: error / total if total > 0 else 0.0 for ratio, error in errors.items()}


def _fit_section(
    source: RowSource,
    geometry: Geometry,
    group: int,
    kind: Kind,
    ratios: Mapping[float, float],
    settings: FitSettings,
    progress: SectionProgress | None,
) -> tuple[SectionBasis, SectionFit]:
    started = time.monotonic()
    name = f"{kind}{group}"

    def report(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(name, stage, done, total)

    generator = torch.Generator().manual_seed(settings.seed)
    index = source.select(heldout=False, limit=settings.train_rows, generator=generator)
    row_size = geometry.row_size(group, kind)

    def blocks(index: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        for part in index.split(size):
            yield source.take(group, kind, part)

    device = torch.device(settings.device)
    solver, rank = choose_solver(len(index), row_size, min(ratios.values()), settings)
    # Only this solver passes over the rows more than once.
    rows = source.take(group, kind, index) if solver == "rsvd" else None
    principal = fit_basis(
        Rows(len(index), row_size, lambda: blocks(index, block_rows(len(index), row_size)))
        if rows is None
        else rows,
        method=solver,
        rank_cap=rank,
        device=device,
        seed=settings.seed,
        progress=report,
    )
    del rows
    report("sample", 0, 1)
    variance, total_variance = principal.variance, principal.total_variance
    full = SectionBasis(principal.mean.to(device), principal.basis.half().to(device), plans={})
    # By far the largest thing here.
    del principal
    drawn = torch.randperm(len(index), generator=generator)[: settings.simulation_rows]
    sample = source.take(group, kind, index[drawn]).to(device)
    plans = make_plans(full, variance, sample, ratios, settings, report)
    del sample

    rank = max(1, *(plan.rank for plan in plans.values()))
    stored = full.basis[:, :rank].contiguous()
    # In the type of the product, or every block would convert it.
    trimmed = SectionBasis(mean=full.mean, basis=stored.float(), plans=plans)
    del full
    unseen = source.select(heldout=True, limit=settings.heldout_rows, generator=generator)

    def unseen_blocks() -> Iterator[torch.Tensor]:
        done = 0
        for block in blocks(unseen, max(1, _HELDOUT_BYTES // (4 * row_size))):
            report("held-out", done, len(unseen))
            yield block.to(device)
            done += len(block)

    errors = heldout_errors(trimmed, plans, unseen_blocks())
    section = SectionBasis(
        mean=trimmed.mean.cpu(), basis=stored.cpu(), plans=plans, heldout_error=errors
    )
    detail = SectionFit(
        variance=variance,
        total_variance=total_variance,
        orthonormality_defect=orthonormality_defect(section.basis),
        method=solver,
        train_rows=len(index),
        heldout_rows=len(unseen),
        seconds=time.monotonic() - started,
    )
    return section, detail


def orthonormality_defect(basis: torch.Tensor) -> float:
    """Largest entry of |V^T V - I|. basis: [p, r], any float dtype."""
    columns = basis.float()
    gram = columns.T @ columns
    gram.diagonal().sub_(1.0)
    return float(gram.abs().max())
