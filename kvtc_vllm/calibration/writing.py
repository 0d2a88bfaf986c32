"""Writing a fitted artifact: whole or not at all, and only if it passes acceptance."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import xxhash

from kvtc_vllm.artifact.card import (
    UNNAMED_CODEC,
    ArtifactCard,
    CacheGroupCard,
    CurveCard,
    DataCard,
    ErrorCard,
    SectionCard,
    SensitivityCard,
    SinkCard,
    save_card,
)
from kvtc_vllm.artifact.directory import checksum, group_directory, rope_fingerprints
from kvtc_vllm.artifact.identity import ModelIdentity
from kvtc_vllm.artifact.rank_file import Probe, rank_file_name, write_rank_file
from kvtc_vllm.calibration.acceptance import check_artifact
from kvtc_vllm.calibration.fit import RankFit
from kvtc_vllm.calibration.report import write_report
from kvtc_vllm.calibration.section_fit import SectionFit
from kvtc_vllm.calibration.sinks import SinkFit
from kvtc_vllm.calibration.weights import RowWeights
from kvtc_vllm.codec.artifact import RankArtifact, SectionKey
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.section_coder import SectionCoder
from kvtc_vllm.codec.v2.plan import StepPlan

_RECORDED_PACKAGES = ("kvtc-vllm", "vllm", "torch")


@dataclass(frozen=True)
class Description:
    """What the fit cannot know about itself; see `ArtifactCard` for the fields."""

    model_name: str
    identity: ModelIdentity
    kv_dtype: str
    data: DataCard
    curve: CurveCard | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True)
class FittedGroup:
    """A cache group of a model with several. fits, probes: one per rank, in order."""

    group: CacheGroupCard
    fits: Sequence[RankFit]
    probes: Sequence[Probe]


def model_slug(model_name: str) -> str:
    """Directory name of a model: "meta-llama/Llama-3.1-8B" -> "meta-llama--Llama-3.1-8B"."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", model_name.replace("/", "--")).strip(".-")
    return slug or "model"


def artifact_name(card: ArtifactCard, further: Sequence[ArtifactCard] = ()) -> str:
    """Default directory name: tp{N}-{layers per group}-{contents}, such as "tp1-all-2a70df41".

    further: cards of the other cache groups.
    """
    groups = card.geometry.layer_groups
    layers = "all" if len(groups) == 1 else str(groups[0][1])
    fingerprints = [text for part in (card, *further) for text in part.fingerprints]
    contents = xxhash.xxh3_64_hexdigest("".join(fingerprints).encode())[:8]
    return f"tp{card.tp_size}-{layers}-{contents}"


def write_artifact(
    root: Path,
    description: Description,
    fits: Sequence[RankFit],
    probes: Sequence[Probe],
    *,
    name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write all ranks of an artifact of one cache group; returns its directory.

    fits, probes: one per rank, in order. The directory appears complete or not
    at all. Raises ArtifactError for a rank that acceptance refuses, for ranks
    that do not fit together, and for a directory that exists, unless
    `overwrite` is set.
    """

    _check(fits, probes)

    def fill(temporary: Path) -> str:
        return artifact_name(_fill(temporary, description, fits, probes))

    return _write(root, description, fill, name, overwrite)


def write_groups(
    root: Path,
    description: Description,
    groups: Sequence[FittedGroup],
    *,
    name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """As `write_artifact`, for a model with several cache groups. Raises what it does."""
    for part in groups:
        _check(part.fits, part.probes)
    cards = tuple(part.group for part in groups)

    def fill(temporary: Path) -> str:
        written = []
        for number, part in enumerate(groups):
            directory = group_directory(temporary, number)
            directory.mkdir(exist_ok=True)
            # Those of the first tell that there are others.
            told = cards if number == 0 else (part.group,)
            written.append(_fill(directory, description, part.fits, part.probes, told))
        return artifact_name(written[0], written[1:])

    return _write(root, description, fill, name, overwrite)


def _write(
    root: Path,
    description: Description,
    fill: Callable[[Path], str],
    name: str | None,
    overwrite: bool,
) -> Path:
    """fill: writes into an empty directory and gives the default name of what it wrote."""
    parent = Path(root) / model_slug(description.model_name)
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=parent))
    try:
        default = fill(temporary)
        _share(temporary, parent)
        final = parent / (name or default)
        _publish(temporary, final, overwrite)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # it may have held others before
            parent.rmdir()
        raise
    return final


def _check(fits: Sequence[RankFit], probes: Sequence[Probe]) -> None:
    """Raise ArtifactError unless all ranks may be written, and together."""
    if not fits or len(fits) != len(probes):
        raise ArtifactError(f"{len(fits)} fitted ranks and {len(probes)} probes; one each is right")
    for rank, fit in enumerate(fits):
        check_artifact(fit.artifact, rank)
        if fit.artifact.geometry != fits[0].artifact.geometry:
            raise ArtifactError(f"rank {rank}: geometry differs from that of rank 0")
        if fit.artifact.ratios() != fits[0].artifact.ratios():
            raise ArtifactError(f"rank {rank}: ratios differ from those of rank 0")


def _fill(
    directory: Path,
    description: Description,
    fits: Sequence[RankFit],
    probes: Sequence[Probe],
    groups: tuple[CacheGroupCard, ...] = (),
) -> ArtifactCard:
    """Rank files, report and card of one cache group; returns the card."""
    sizes: dict[str, int] = {}
    checksums: dict[str, str] = {}
    for rank, (fit, probe) in enumerate(zip(fits, probes, strict=True)):
        path = directory / rank_file_name(rank, len(fits))
        write_rank_file(path, fit.artifact, probe, rank, len(fits))
        sizes[path.name] = path.stat().st_size
        checksums[path.name] = checksum(path)
    card = _card(description, fits, sizes, checksums)
    if groups:
        card = msgspec.structs.replace(card, cache_groups=groups)
    write_report(directory, card, fits)
    save_card(directory, card)
    return card


def _share(directory: Path, parent: Path) -> None:
    """Give the permissions of `parent`: mkdtemp and safetensors make private files."""
    mode = parent.stat().st_mode & 0o777
    directory.chmod(mode)
    for path in directory.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)


def _publish(temporary: Path, final: Path, overwrite: bool) -> None:
    if final.exists():
        if not overwrite:
            raise ArtifactError(f"{final}: exists already; give another name or allow overwriting")
        # A directory cannot be renamed over one with files in it.
        old = Path(tempfile.mkdtemp(prefix=".replaced-", dir=final.parent))
        final.rename(old / final.name)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        return
    temporary.rename(final)


def _card(
    description: Description,
    fits: Sequence[RankFit],
    sizes: dict[str, int],
    checksums: dict[str, str],
) -> ArtifactCard:
    first = fits[0].artifact
    methods = {detail.method for fit in fits for detail in fit.sections.values()}
    return ArtifactCard(
        model_name=description.model_name,
        identity=description.identity.identity,
        config_fingerprint=description.identity.config,
        weights_fingerprint=description.identity.weights,
        tp_size=len(fits),
        fingerprints=tuple(fit.artifact.fingerprint.hex() for fit in fits),
        rope_fingerprints=rope_fingerprints(first),
        kv_dtype=description.kv_dtype,
        geometry=first.geometry,
        sink_tokens=first.sink_tokens,
        data=description.data,
        ratios=first.ratios(),
        sections=tuple(
            card
            for rank, fit in enumerate(fits)
            for card in section_cards(rank, fit.artifact, fit.sections)
        ),
        size_bytes=sizes,
        checksums=checksums,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        method="+".join(sorted(methods)),
        seconds=round(sum(fit.seconds for fit in fits), 3),
        key_share=fits[0].key_share,
        sensitivity=_sensitivity_card(fits[0].weights),
        sinks=_sink_cards(fits),
        curve=description.curve,
        codec=msgspec.UNSET if first.codec == UNNAMED_CODEC else first.codec,
    )


def _sensitivity_card(
    of_rank: RowWeights | None,
) -> SensitivityCard | msgspec.UnsetType:
    if of_rank is None:
        return msgspec.UNSET
    found = of_rank.sensitivity
    every = replace(of_rank, heads=None)
    layers, heads = every.of_layers(), every.of_heads()
    apart = every.metric == "head"
    return SensitivityCard(
        method=found.method,
        averaged="all" if every.average is found.all_tokens else "ordinary",
        metric=every.metric,
        documents=found.documents,
        tokens=every.average.tokens,
        seed=found.source.seed,
        key_weights=tuple(layers["k"].tolist()),
        value_weights=tuple(layers["v"].tolist()),
        key_head_weights=tuple(map(tuple, heads["k"].tolist())) if apart else msgspec.UNSET,
        value_head_weights=tuple(map(tuple, heads["v"].tolist())) if apart else msgspec.UNSET,
        marked_share=msgspec.UNSET if found.marked is None else found.marked.share,
        marked_energy=msgspec.UNSET if found.marked is None else found.marked.energy,
    )


def _sink_cards(fits: Sequence[RankFit]) -> tuple[SinkCard, ...] | msgspec.UnsetType:
    if any(fit.sinks is None for fit in fits):
        return msgspec.UNSET
    return tuple(_sink_card(rank, s) for rank, fit in enumerate(fits) for s in fit.sinks or ())


def _sink_card(rank: int, sinks: SinkFit) -> SinkCard:
    return SinkCard(
        rank=rank,
        layers=sinks.rule.layers,
        threshold=sinks.rule.threshold,
        max_share=sinks.rule.max_share,
        separation=sinks.separation,
        valley=sinks.valley,
        train_share=sinks.train_share,
        heldout_share=sinks.heldout_share,
        documents=sinks.documents,
    )


def section_cards(
    rank: int,
    artifact: RankArtifact,
    details: Mapping[SectionKey, SectionFit] | None = None,
) -> list[SectionCard]:
    """Of every section its sizes and the errors of its plans. details: of the fit, if known."""

    def plain_error(key: SectionKey, ratio: float) -> float | msgspec.UnsetType:
        errors = None if details is None else details[key].plain_error
        return msgspec.UNSET if errors is None else errors[ratio]

    return [
        SectionCard(
            rank=rank,
            group=group,
            kind=kind,
            row_size=section.basis.shape[0],
            basis_rank=section.basis.shape[1],
            errors=tuple(
                ErrorCard(
                    ratio=ratio,
                    predicted=section.plans[ratio].expected_error,
                    heldout=section.heldout_error[ratio],
                    heldout_plain=plain_error((group, kind), ratio),
                    token_bytes=_token_bytes(section.plans[ratio]),
                )
                for ratio in sorted(section.plans)
            ),
        )
        for (group, kind), section in artifact.sections.items()
    ]


def _token_bytes(plan: SectionCoder) -> float | msgspec.UnsetType:
    return plan.token_bytes if isinstance(plan, StepPlan) else msgspec.UNSET


def _versions() -> dict[str, str]:
    found = {}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
