"""Fitting one rank: rows -> mean, basis, plans and their held-out error, section by section."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvtc_vllm.artifact.fingerprint import artifact_fingerprint
from kvtc_vllm.calibration.allocation import divide_budget
from kvtc_vllm.calibration.fit_settings import FitSettings, lowest_own_ratio, own_ratios
from kvtc_vllm.calibration.section_fit import (
    RowSource,
    SectionFit,
    SectionFitter,
    SectionProgress,
)
from kvtc_vllm.calibration.sinks import SinkFit
from kvtc_vllm.calibration.step_fit import fit_steps
from kvtc_vllm.calibration.weights import RowWeights
from kvtc_vllm.codec.artifact import (
    KINDS,
    Geometry,
    Kind,
    RankArtifact,
    SectionBasis,
    SectionKey,
)
from kvtc_vllm.codec.bitplan import apply_plan, budget_bits
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.v2.codec import Kvtc2Codec


@dataclass(frozen=True)
class RankFit:
    """A fitted rank and how the fit went.

    artifact: with a fingerprint, ready to be written.
    sections: one per section of the artifact.
    seconds: of the whole fit.
    key_share, weights: see `FitSettings`.
    sinks: the floating sinks that the rank's rows show, one entry or none; None: nobody looked.
    """

    artifact: RankArtifact
    sections: dict[SectionKey, SectionFit]
    seconds: float
    key_share: float | None = None
    weights: RowWeights | None = None
    sinks: tuple[SinkFit, ...] | None = None


def fit_rank(
    source: RowSource,
    geometry: Geometry,
    ropes: tuple[Rope, ...],
    layer_rope: tuple[int | None, ...],
    ratios: Sequence[float],
    *,
    sink_tokens: int = 4,
    sinks: tuple[SinkFit, ...] | None = None,
    settings: FitSettings | None = None,
    progress: SectionProgress | None = None,
) -> RankFit:
    """Fit every section of one rank.

    ratios: target ratios of K and V together, one plan each. sinks: see `RankFit`.
    `estimate_fit` tells the peak memory beforehand. Raises ArtifactError if training or held-out
    rows are missing or the key share does not go with the ratios, ValueError for other settings
    out of range.
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
    rule = sinks[0].rule if sinks and settings.marks_sinks else None
    if settings.codec == Kvtc2Codec.name:
        found = fit_steps(source, geometry, ratios, sink_tokens, rule, settings, progress)
    else:
        found = _fit_plans(source, geometry, ratios, settings, progress)
    sections = {key: section for key, (section, _) in found.items()}
    artifact = RankArtifact(
        geometry=geometry,
        sections=sections,
        ropes=ropes,
        layer_rope=layer_rope,
        fingerprint=artifact_fingerprint(geometry, sections, sink_tokens, rule),
        sink_tokens=sink_tokens,
        codec=settings.codec,
        sink_rule=rule,
    )
    details = {key: detail for key, (_, detail) in found.items()}
    return RankFit(
        artifact, details, time.monotonic() - started, settings.key_share, settings.weights, sinks
    )


def _fit_plans(
    source: RowSource,
    geometry: Geometry,
    ratios: Sequence[float],
    settings: FitSettings,
    progress: SectionProgress | None,
) -> dict[SectionKey, tuple[SectionBasis, SectionFit]]:
    """Bit plans of every section, layer group by layer group."""
    fit_group = _fit_together if settings.common_budget else _fit_apart
    return {
        (group, kind): fitted
        for group in range(len(geometry.layer_groups))
        for kind, fitted in fit_group(source, geometry, group, ratios, settings, progress).items()
    }


def _fit_apart(
    source: RowSource,
    geometry: Geometry,
    group: int,
    ratios: Sequence[float],
    settings: FitSettings,
    progress: SectionProgress | None,
) -> dict[Kind, tuple[SectionBasis, SectionFit]]:
    """K and V of a layer group, each under a budget of its own."""
    found = {}
    for kind in KINDS:
        own = own_ratios(geometry, group, kind, ratios, settings)
        lowest = min(own.values())
        fitter = SectionFitter(source, geometry, group, kind, lowest, settings, progress)
        budgets = {ratio: budget_bits(fitter.row_size, own[ratio]) for ratio in ratios}
        table = fitter.table(tuple(budgets.values()))
        found[kind] = fitter.finish(
            {ratio: table.plan(ratio, bits) for ratio, bits in budgets.items()}, apply_plan
        )
    return found


def _fit_together(
    source: RowSource,
    geometry: Geometry,
    group: int,
    ratios: Sequence[float],
    settings: FitSettings,
    progress: SectionProgress | None,
) -> dict[Kind, tuple[SectionBasis, SectionFit]]:
    """K and V of a layer group under one budget, divided so that their errors cost least."""
    fitters = {}
    tables = {}
    for kind in KINDS:
        lowest = lowest_own_ratio(geometry, group, kind, ratios, settings)
        fitter = SectionFitter(source, geometry, group, kind, lowest, settings, progress)
        tables[kind] = fitter.table((budget_bits(fitter.row_size, lowest),))
        fitters[kind] = fitter
    both = sum(fitter.row_size for fitter in fitters.values())
    shares = {ratio: divide_budget(tables, budget_bits(both, ratio)) for ratio in ratios}
    plans = {
        kind: {ratio: table.plan(ratio, shares[ratio][kind]) for ratio in ratios}
        for kind, table in tables.items()
    }
    # The largest thing that the rest does without.
    tables.clear()
    return {kind: fitter.finish(plans[kind], apply_plan) for kind, fitter in fitters.items()}
