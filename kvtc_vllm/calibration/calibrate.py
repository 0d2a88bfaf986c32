"""Calibration from end to end: capture, or an earlier spool; fit every rank; accept; write."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvtc_vllm.artifact.card import CacheGroupCard, DataCard
from kvtc_vllm.artifact.directory import group_directory
from kvtc_vllm.artifact.identity import ModelIdentity
from kvtc_vllm.calibration.capture import CaptureSettings, capture_rows
from kvtc_vllm.calibration.capture_record import CaptureRecord, find_record
from kvtc_vllm.calibration.fit import RankFit, fit_rank
from kvtc_vllm.calibration.fit_settings import FitSettings, estimate_fit
from kvtc_vllm.calibration.heldout_documents import spool_heldout
from kvtc_vllm.calibration.in_transformers import check_supported
from kvtc_vllm.calibration.progress import FitProgress
from kvtc_vllm.calibration.quality_curve import (
    CURVE,
    CurveSettings,
    at_quality,
    measure_curve,
)
from kvtc_vllm.calibration.sensitivity import Sensitivity, SensitivityMeasure, load_sensitivity
from kvtc_vllm.calibration.shards import RankRows, rank_heads
from kvtc_vllm.calibration.sinks import fit_sinks
from kvtc_vllm.calibration.spool import SpoolReader, cache_group_places
from kvtc_vllm.calibration.weights import Metric, RowWeights, Tokens, finer_steps
from kvtc_vllm.calibration.writing import (
    Description,
    FittedGroup,
    write_artifact,
    write_groups,
)
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.v2.nesting import nested_ratios


@dataclass(frozen=True)
class ArtifactSettings:
    """What to make of a spool.

    ratios: target ratios, one plan each.
    fit: how to fit.
    tp: tensor-parallel size that will serve; None: as captured.
    layers_per_group: layers coded together; None: all.
    out: registry directory to write into.
    name: directory of the artifact; None: see `writing.artifact_name`.
    model_name: what to call the model on the card; None: as it was captured.
    sensitivity_tokens, sensitivity_metric: of the weights, if rows are weighted; see `RowWeights`.
    Tokens of None are the ordinary ones where the artifact gets a sink rule, else all.
    sink_gain: how much finer the steps of floating sinks are; None: see `weights.finer_steps`, and
    4 without sensitivities.
    sink_tokens: first positions that are stored exactly; None: those that the capture left out.
    curve: measure what the ratios cost, with this model; None: do not.
    quality: keep the plan of the highest ratio of which a KL of at most this was measured, in nats
    per token, and no other; None: keep all. It takes a curve.
    """

    ratios: Sequence[float]
    fit: FitSettings
    tp: int | None = None
    layers_per_group: int | None = None
    out: str = "calibrations"
    name: str | None = None
    model_name: str | None = None
    sensitivity_tokens: Tokens | None = None
    sensitivity_metric: Metric = "layer"
    sink_gain: float | None = None
    sink_tokens: int | None = None
    curve: CurveSettings | None = None
    quality: float | None = None


def calibrate(
    capture: CaptureSettings,
    settings: ArtifactSettings,
    *,
    spool: str | None = None,
    sensitivity: SensitivityMeasure | None = None,
) -> Path:
    """Fit an artifact and write it into a registry; returns its directory.

    spool: keep captured rows here, and use those of an earlier run; None: a temporary directory.
    sensitivity: weigh rows by what this measures; None: do not weigh them.
    Raises DataError for unreadable data, ArtifactError for a spool of other settings, for a
    model that sensitivities cannot be had of and for a result that acceptance refuses; nothing is
    then written.
    """
    if sensitivity is not None:
        sensitivity.check()
    if settings.curve is not None:
        check_supported(
            settings.curve.directory(),
            CURVE,
            trust_remote_code=settings.curve.trust_remote_code,
        )
    with _spool_directory(spool) as directory:
        record = capture_rows(capture, directory)
        measured = None
        if sensitivity is not None:
            measured = sensitivity.measure(record, directory)
        if settings.curve is not None:
            _check_curve(cache_group_places(directory))
            spool_heldout(capture, record, directory, CURVE)
        return fit_spool(directory, settings, measured)


def fit_spool(spool: Path, settings: ArtifactSettings, sensitivity: Path | None = None) -> Path:
    """Fit an artifact to a finished spool and write it; returns its directory.

    sensitivity: the file that rows are weighted by, see `sensitivity.load_sensitivity`; those of
    further cache groups lie beside it as in a spool. None: rows are not weighted. Raises
    ArtifactError for a spool that is missing, unfinished or damaged, for a sensitivity of another
    model, for KV heads that do not divide among the ranks, for a curve that cannot be measured or
    a quality that no ratio has, and for a result that acceptance refuses.
    """
    record = find_record(spool)
    if record is None:
        raise ArtifactError(
            f"{spool}: holds no finished capture; make one with: kvtc calibrate --spool {spool}"
        )
    places = cache_group_places(spool)
    # The same draws as `calibrate` from the beginning, hence the same artifact.
    settings = replace(settings, fit=replace(settings.fit, seed=record.source.seed))
    found: list[Sensitivity | None] = [None] * len(places)
    if sensitivity is not None:
        found = [
            _own_sensitivity(
                group_directory(sensitivity.parent, number) / sensitivity.name,
                record,
                SpoolReader(place / "rank0"),
            )
            for number, place in enumerate(places)
        ]
    if settings.curve is not None:
        _check_curve(places)
    groups = [
        _fit_group(place, record, settings, own) for place, own in zip(places, found, strict=True)
    ]
    description = _describe(record, SpoolReader(spool / "rank0"), settings.model_name)
    if settings.curve is not None:
        artifacts = [fit.artifact for fit in groups[0].fits]
        curve = measure_curve(spool, record, artifacts, settings.curve)
        if settings.quality is not None:
            curve, kept = at_quality(curve, groups[0].fits, settings.quality)
            groups[0] = replace(groups[0], fits=kept)
        description = replace(description, curve=curve)
    root = Path(settings.out)
    if len(groups) > 1:
        return write_groups(root, description, groups, name=settings.name)
    return write_artifact(root, description, groups[0].fits, groups[0].probes, name=settings.name)


def _check_curve(places: Sequence[Path]) -> None:
    if len(places) > 1:
        raise ArtifactError(
            f"{CURVE.option}: the model has {len(places)} cache groups, and a replay has caches of "
            f"one; {CURVE.instead}"
        )


def _fit_group(
    place: Path, record: CaptureRecord, settings: ArtifactSettings, found: Sensitivity | None
) -> FittedGroup:
    """All ranks of one cache group. found: weigh rows by it; None: do not weigh them."""
    readers = [SpoolReader(place / f"rank{rank}") for rank in range(record.tp_size)]
    header = readers[0].header
    tp = record.tp_size if settings.tp is None else settings.tp
    sources = [RankRows(readers, tp, rank, settings.layers_per_group) for rank in range(tp)]
    # Ranks that hold copies of one head have the same fit.
    by_heads: dict[range, RankFit] = {}
    fits = []
    for rank, source in enumerate(sources):
        heads = rank_heads(header.total_kv_heads, tp, rank)
        if heads not in by_heads:
            exact = settings.sink_tokens
            first = record.source.sink_tokens if exact is None else exact
            by_heads[heads] = _fit(source, rank, settings, first, found, heads)
            settings = _named_alike(settings, by_heads[heads])
        fits.append(by_heads[heads])
    group = CacheGroupCard(attention=header.attention, layers=header.layers)
    return FittedGroup(group, fits, [source.probe() for source in sources])


def _named_alike(settings: ArtifactSettings, first: RankFit) -> ArtifactSettings:
    """For the other ranks, whose nested plans have nearly these ratios."""
    steps = settings.fit.steps
    if not steps.halvings or steps.nested:
        return settings
    coarser = nested_ratios(first.artifact)
    names: list[float] = []
    for ratio in sorted(settings.ratios):
        while ratio in coarser:
            ratio = coarser[ratio]
            names.append(ratio)
    steps = replace(steps, nested=tuple(names))
    return replace(settings, fit=replace(settings.fit, steps=steps))


def _own_sensitivity(path: Path, record: CaptureRecord, reader: SpoolReader) -> Sensitivity:
    """The sensitivity in a file, if it is of the spool's model."""
    found = load_sensitivity(path, reader.geometry.num_layers, reader.header.total_kv_heads)
    if found.source.model != record.source.model:
        raise ArtifactError(
            f"{path}: is of model {found.source.model}, the spool of "
            f"{record.source.model}; give the file that its own calibration left"
        )
    return found


def _fit(
    source: RankRows,
    rank: int,
    settings: ArtifactSettings,
    sink_tokens: int,
    found: Sensitivity | None,
    heads: range,
) -> RankFit:
    rows = source.count(heldout=False)
    sinks = fit_sinks(source)
    fit = settings.fit
    if found is not None:
        protected = sinks is not None and fit.marks_sinks
        tokens = settings.sensitivity_tokens or ("ordinary" if protected else "all")
        weights = RowWeights(found, tokens, settings.sensitivity_metric, heads)
        fit = replace(fit, weights=weights)
    gain = settings.sink_gain or (None if found is None else finer_steps(found))
    if gain is not None:
        fit = replace(fit, steps=replace(fit.steps, sink_gain=gain))
    estimate = estimate_fit(source.geometry, rows, settings.ratios, fit)
    count = len(fit.section_names) * len(source.geometry.layer_groups)
    sections = "1 section" if count == 1 else f"{count} sections"
    where = "a GPU" if fit.device.startswith("cuda") else "one core"
    print(
        f"rank {rank}: {sections} of {rows} rows by {'+'.join(estimate.solvers)}, "
        f"peak memory about {estimate.peak_bytes / 2**30:.2f} GiB on {fit.device} and "
        f"host together, PCA about {estimate.pca_seconds / 60:.1f} min on {where}",
        flush=True,
    )
    if sinks is not None:
        print(f"rank {rank}: {sinks.train_share:.2%} of the tokens are floating sinks", flush=True)
    with FitProgress(rank) as progress:
        return fit_rank(
            source,
            source.geometry,
            source.ropes,
            source.layer_rope,
            settings.ratios,
            sink_tokens=sink_tokens,
            sinks=() if sinks is None else (sinks,),
            settings=fit,
            progress=progress,
        )


def _describe(record: CaptureRecord, reader: SpoolReader, model_name: str | None) -> Description:
    config, _, weights = record.source.model.partition("-")
    return Description(
        model_name=model_name or record.model_name,
        identity=ModelIdentity(config=config, weights=weights),
        kv_dtype=reader.header.dtype,
        data=DataCard(
            files=record.files,
            tokens=record.tokens_run,
            train_tokens=reader.count(heldout=False),
            heldout_tokens=reader.count(heldout=True),
            seed=record.source.seed,
        ),
    )


@contextlib.contextmanager
def _spool_directory(spool: str | None) -> Iterator[Path]:
    if spool is not None:
        yield Path(spool)
        return
    with tempfile.TemporaryDirectory(prefix="kvtc-spool-") as directory:
        yield Path(directory)
