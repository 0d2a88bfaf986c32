"""Fitting one rank: rows -> mean, basis, plans and their held-out error.

The basis is rounded to float16, as it will be stored, before the allocation
sees a coefficient, so plans and errors are those of the artifact itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from kvtc_vllm.artifact.fingerprint import artifact_fingerprint
from kvtc_vllm.calibration.pca import (
    RANK_CAP,
    Method,
    PrincipalBasis,
    effective_rank,
    fit_basis,
    peak_bytes,
)
from kvtc_vllm.codec.artifact import KINDS, Geometry, Kind, RankArtifact, SectionBasis
from kvtc_vllm.codec.bitplan import (
    GROUP_SIZES,
    WINDOW_SAMPLES,
    allocate,
    apply_plan,
    table_bytes,
)
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.payload import BitPlan
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.transform import from_coefficients, to_coefficients

SectionProgress = Callable[[str, str, int, int], None]
"""Called as (section such as "k0", stage, done, total); stages: read, pca, simulate, allocate."""

_BLOCK_BYTES = 256 * 2**20


class RowSource(Protocol):
    """Where rows come from: `kvtc_vllm.calibration.spool.SpoolReader`, or arrays in a test."""

    def count(self, *, heldout: bool) -> int:
        """Number of training or held-out rows."""
        ...

    def rows(
        self,
        group: int,
        kind: Kind,
        *,
        heldout: bool,
        limit: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """float32 [n, p]; K pre-RoPE. At most `limit`, drawn with `generator`."""
        ...


@dataclass(frozen=True)
class FitSettings:
    """How to fit.

    method, rank_cap: see `pca`. sizes, window_samples: see `bitplan.allocate`.
    train_rows, heldout_rows: at most this many of each, None = all.
    simulation_rows: rows that the allocation quantises. The paper uses 32K; on
    keys of the reference model 512, 2048 and 8192 rows gave plans of the same
    held-out error to three digits, and 2048 predict it within 5 %.
    key_share: of the bits of both, those of the keys; None codes K and V at the
    same ratio, as the paper.
    """

    method: Method = "auto"
    rank_cap: int = RANK_CAP
    sizes: tuple[int, ...] = GROUP_SIZES
    window_samples: int | None = WINDOW_SAMPLES
    train_rows: int | None = None
    heldout_rows: int | None = 8192
    simulation_rows: int = 2048
    key_share: float | None = None
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class SectionFit:
    """What the report says about one section besides the artifact.

    variance: float64 [r], falling. total_variance: over all p dimensions.
    orthonormality_defect: largest entry of |V^T V - I| of the stored basis.
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
    """A fitted rank and how the fit went."""

    artifact: RankArtifact
    sections: dict[tuple[int, Kind], SectionFit]
    seconds: float
    key_share: float | None = None


def estimate_bytes(
    geometry: Geometry, train_rows: int, ratios: Sequence[float], settings: FitSettings
) -> int:
    """Peak memory of a fit in bytes: the largest section's rows, PCA and allocation."""
    peak = 0
    for group in range(len(geometry.layer_groups)):
        for kind in KINDS:
            p = geometry.row_size(group, kind)
            rank = effective_rank(train_rows, p, settings.rank_cap)
            held = train_rows * p * 4
            pca = peak_bytes(train_rows, p, settings.method, settings.rank_cap)
            lowest = min(_own_ratios(geometry, group, kind, ratios, settings).values())
            table = table_bytes(rank, p, lowest, settings.sizes) + 2 * p * rank * 4
            peak = max(peak, held + max(pca, table))
    return peak


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

    ratios: target ratios of K and V together, one plan each. `estimate_bytes` tells the
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
            own = _own_ratios(geometry, group, kind, ratios, settings)
            section, detail = _fit_section(source, group, kind, own, settings, progress)
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


def heldout_error(section: SectionBasis, plan: BitPlan, rows: torch.Tensor) -> float:
    """Relative squared error of rows through project, quantise, dequantise, reconstruct.

    rows: float32 [n, p] on the device to use. 0 for rows without variance.
    """
    error = total = 0.0
    step = max(1, _BLOCK_BYTES // (4 * rows.shape[1]))
    mean = section.mean.to(rows.device)
    for block in rows.split(step):
        coefficients = to_coefficients(block, section, plan.rank)
        restored = from_coefficients(apply_plan(coefficients, plan), section)
        error += float((block - restored).double().square().sum())
        total += float((block - mean).double().square().sum())
    return error / total if total > 0 else 0.0


def own_ratio(geometry: Geometry, group: int, kind: Kind, ratio: float, share: float) -> float:
    """Ratio of K or V of a layer group, where both together have `ratio` and K `share` of the bits.

    The paper codes both at the target ratio. What a model bears differs: `kvtc eval MODEL
    --ablation keys-values` measures it at equal bytes. share: above 0, below 1. Raises
    ArtifactError if that would take K or V below 1x: more bits than the cache has.
    """
    if not 0 < share < 1:
        raise ArtifactError(f"key share {share} must be above 0 and below 1")
    both = sum(geometry.row_size(group, k) for k in KINDS)
    part = share if kind == "k" else 1 - share
    own = ratio * geometry.row_size(group, kind) / (part * both)
    if own < 1:
        raise ArtifactError(
            f"a key share of {share:g} at ratio {ratio:g} gives {kind.upper()} more bits than "
            "the cache has; take a share nearer to 0.5, or leave out low ratios"
        )
    return own


def _own_ratios(
    geometry: Geometry,
    group: int,
    kind: Kind,
    ratios: Sequence[float],
    settings: FitSettings,
) -> dict[float, float]:
    """Target ratio -> that of this section."""
    share = settings.key_share
    if share is None:
        return {ratio: ratio for ratio in ratios}
    return {ratio: own_ratio(geometry, group, kind, ratio, share) for ratio in ratios}


def _fit_section(
    source: RowSource,
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
    report("read", 0, 1)
    rows = source.rows(group, kind, heldout=False, limit=settings.train_rows, generator=generator)
    report("pca", 0, 1)
    principal = fit_basis(
        rows,
        method=settings.method,
        rank_cap=settings.rank_cap,
        device=settings.device,
        seed=settings.seed,
    )
    report("pca", 1, 1)
    basis = principal.basis.half().to(settings.device)
    full = SectionBasis(mean=principal.mean.to(settings.device), basis=basis, plans={})
    sample = _sample(rows, settings.simulation_rows, generator).to(settings.device)
    plans = _plans(full, sample, ratios, settings, report)
    train_rows = len(rows)
    # The training rows are by far the largest thing here; held-out ones come next.
    del rows, sample

    rank = max(1, *(plan.rank for plan in plans.values()))
    trimmed = SectionBasis(mean=full.mean, basis=basis[:, :rank].contiguous(), plans=plans)
    unseen = source.rows(
        group, kind, heldout=True, limit=settings.heldout_rows, generator=generator
    ).to(settings.device)
    errors = {ratio: heldout_error(trimmed, plan, unseen) for ratio, plan in plans.items()}
    section = SectionBasis(
        mean=trimmed.mean.cpu(), basis=trimmed.basis.cpu(), plans=plans, heldout_error=errors
    )
    return section, _detail(principal, section, train_rows, len(unseen), started)


def _plans(
    section: SectionBasis,
    sample: torch.Tensor,
    ratios: Mapping[float, float],
    settings: FitSettings,
    report: Callable[[str, int, int], None],
) -> dict[float, BitPlan]:
    """Allocate on the coefficients of `sample` [n, p]; `section` has no plans yet.

    ratios: target ratio, under which a plan is kept -> that of this section.
    """
    row_size, rank = section.basis.shape
    coefficients = to_coefficients(sample, section, rank)
    total = float((sample - section.mean).double().square().sum())
    inside = float(coefficients.double().square().sum())
    found = allocate(
        coefficients,
        row_size,
        tuple(ratios.values()),
        residual_energy=max(0.0, total - inside),
        sizes=settings.sizes,
        window_samples=settings.window_samples,
        device=settings.device,
        progress=report,
    )
    return {ratio: replace(found[own], ratio=ratio) for ratio, own in ratios.items()}


def _sample(rows: torch.Tensor, limit: int, generator: torch.Generator) -> torch.Tensor:
    """At most `limit` rows in random order."""
    return rows[torch.randperm(len(rows), generator=generator)[:limit]]


def _detail(
    principal: PrincipalBasis,
    section: SectionBasis,
    train_rows: int,
    heldout_rows: int,
    started: float,
) -> SectionFit:
    return SectionFit(
        variance=principal.variance,
        total_variance=principal.total_variance,
        orthonormality_defect=orthonormality_defect(section.basis),
        method=principal.method,
        train_rows=train_rows,
        heldout_rows=heldout_rows,
        seconds=time.monotonic() - started,
    )


def orthonormality_defect(basis: torch.Tensor) -> float:
    """Largest entry of |V^T V - I|. basis: [p, r], any float dtype."""
    columns = basis.float()
    gram = columns.T @ columns
    gram.diagonal().sub_(1.0)
    return float(gram.abs().max())
