"""What an artifact's ratios cost: KL on held-out documents, measured when it is made.

The documents are kept beside the captured rows, so that a later fit of the same spool measures on
the same ones. It takes the model in transformers, whose cache must be the one that was captured:
that is compared, token by token, with the spool's held-out rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from tqdm import tqdm

from kvtc_vllm.artifact.card import CurveCard, CurvePoint
from kvtc_vllm.artifact.fingerprint import artifact_fingerprint
from kvtc_vllm.artifact.identity import model_directory, model_identity
from kvtc_vllm.calibration.cache_replay import (
    Prefix,
    compute_prefix,
    interval,
    kl,
    round_trip,
    score,
)
from kvtc_vllm.calibration.capture import CaptureSettings
from kvtc_vllm.calibration.capture_record import CaptureRecord
from kvtc_vllm.calibration.fit import RankFit
from kvtc_vllm.calibration.heldout_documents import (
    EXACT_TOKENS,
    PREFIX_TOKENS,
    SCORED_TOKENS,
    load_heldout,
)
from kvtc_vllm.calibration.in_transformers import Asked, Loaded, load_model
from kvtc_vllm.calibration.rows import CapturedRows
from kvtc_vllm.calibration.shards import RankRows, rank_heads
from kvtc_vllm.calibration.spool import DTYPES, SpoolReader
from kvtc_vllm.calibration.step_plans import CHUNK_TOKENS
from kvtc_vllm.codec.artifact import KINDS, RankArtifact, at_ratio
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.errors import ArtifactError, CodecError
from kvtc_vllm.codec.registry import open_codec

CURVE = Asked("--quality-curve", "leave it out, as well as --quality")
LARGEST_DIFFERENCE = 0.05
"""Relative squared, of a cache in transformers from the captured one. Rounding makes 1e-4; another
order of elements, another rotation or another model far more."""


@dataclass(frozen=True)
class CurveSettings:
    """Where the model is, and how it runs. model: directory or hub name; device: as torch does."""

    model: str
    device: str = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False

    def directory(self) -> Path:
        """Of the model. Raises ArtifactError."""
        return model_directory(self.model, self.revision)


def curve_settings(capture: CaptureSettings, device: str) -> CurveSettings:
    """Of the model that is captured."""
    return CurveSettings(
        model=capture.model,
        device=device,
        revision=capture.engine.get("revision"),
        trust_remote_code=bool(capture.engine.get("trust_remote_code")),
    )


def measure_curve(
    spool: Path,
    record: CaptureRecord,
    artifacts: Sequence[RankArtifact],
    settings: CurveSettings,
    say: Callable[[str], None] = print,
) -> CurveCard:
    """KL and real ratio of an artifact's target ratios. artifacts: of all ranks, in order.

    Raises ArtifactError for a spool without held-out documents, for another model, and where
    transformers' cache is not the engine's.
    """
    kept = load_heldout(spool, record.source.model)
    live = model_identity(settings.model, settings.revision).identity
    if live != record.source.model:
        raise ArtifactError(
            f"{settings.model}: is model {live}, the spool is of {record.source.model}; give the "
            "model that was captured"
        )
    readers = [SpoolReader(spool / f"rank{rank}") for rank in range(record.tp_size)]
    rows = RankRows(readers, 1, 0, None)
    dtype = DTYPES[readers[0].header.dtype]
    loaded = load_model(
        settings.directory(),
        settings.device,
        CURVE,
        trust_remote_code=settings.trust_remote_code,
    )
    heads = [
        rank_heads(readers[0].header.total_kv_heads, len(artifacts), rank)
        for rank in range(len(artifacts))
    ]
    ratios = artifacts[0].ratios()
    # Ranks that hold copies of one head store the same.
    distinct = {part: artifact for part, artifact in zip(heads, artifacts, strict=True)}
    codecs = {
        ratio: {
            part: open_codec(artifact.codec, dtype, artifact=artifact, ratio=ratio)
            for part, artifact in distinct.items()
        }
        for ratio in ratios
    }
    divergence: dict[float, list[float]] = {ratio: [] for ratio in ratios}
    stored = dict.fromkeys(ratios, 0)
    raw = 0
    for number, ids in tqdm(kept.documents.items(), unit="document", desc="quality curve"):
        prefix = _prefix(loaded, settings, number, ids, dtype, rows)
        raw += prefix.k.nbytes + prefix.v.nbytes
        for ratio, of_ranks in codecs.items():
            taken, k, v = _through(of_ranks, prefix)
            stored[ratio] += taken
            found = score(loaded.model, ids, k, v, prefix.scored)
            divergence[ratio].append(kl(prefix.exact, found))
    points = tuple(_point(r, divergence[r], raw / stored[r]) for r in ratios)
    for point in points:
        say(f"{point.ratio:g}x: real ratio {point.real_ratio:.1f}, KL {point.kl:.5f}")
    return CurveCard(
        documents=tuple(kept.documents),
        prefix_tokens=PREFIX_TOKENS,
        exact_tokens=EXACT_TOKENS,
        scored_tokens=SCORED_TOKENS,
        chunk_tokens=CHUNK_TOKENS,
        points=points,
    )


def at_quality(
    curve: CurveCard, fits: Sequence[RankFit], quality: float
) -> tuple[CurveCard, list[RankFit]]:
    """The highest ratio whose KL is at most `quality`, nats per token, and no other.

    fits: of all ranks. Raises ArtifactError if no ratio's is.
    """
    within = [point for point in curve.points if point.kl <= quality]
    if not within:
        least = curve.points[0]
        raise ArtifactError(
            f"--quality {quality:g}: the lowest ratio, {least.ratio:g}x, has a KL of "
            f"{least.kl:.2g}; give a higher one, or lower --ratios"
        )
    point = max(within, key=lambda p: p.ratio)
    kept = []
    for fit in fits:
        own = at_ratio(fit.artifact, point.ratio)
        fingerprint = artifact_fingerprint(
            own.geometry, own.sections, own.sink_tokens, own.sink_rule
        )
        kept.append(replace(fit, artifact=replace(own, fingerprint=fingerprint)))
    return msgspec.structs.replace(curve, points=(point,)), kept


def _point(ratio: float, divergence: Sequence[float], real_ratio: float) -> CurvePoint:
    low, high = interval(divergence)
    mean = sum(divergence) / len(divergence)
    return CurvePoint(ratio=ratio, real_ratio=real_ratio, kl=max(0.0, mean), low=low, high=high)


def _prefix(
    loaded: Loaded,
    settings: CurveSettings,
    number: int,
    ids: Sequence[int],
    dtype: torch.dtype,
    rows: CapturedRows,
) -> Prefix:
    whole = PREFIX_TOKENS + EXACT_TOKENS + SCORED_TOKENS
    prefix = len(ids) * PREFIX_TOKENS // whole
    scored = max(1, len(ids) * SCORED_TOKENS // whole)
    try:
        found = compute_prefix(loaded.model, f"document {number}", ids, prefix, scored, dtype)
    except Exception as error:  # whatever a model's own code raises
        raise CURVE.unusable(settings.directory(), error) from error
    _check_captured(found, settings, number, rows)
    return found


def _check_captured(
    prefix: Prefix, settings: CurveSettings, number: int, rows: CapturedRows
) -> None:
    """Raise ArtifactError if the cache of a document is not what the engine had there."""
    index = (rows.docs == number) & rows.heldout & (rows.positions < len(prefix.k))
    captured = index.nonzero().flatten()
    positions = rows.positions[captured]
    for kind, own in zip(KINDS, (prefix.k, prefix.v), strict=True):
        there = rows.cache_rows(kind, captured, 0, rows.geometry.num_layers).float()
        here = own[positions].float()
        if here.shape != there.shape:
            raise CURVE.unusable(
                settings.directory(),
                f"its {kind.upper()} has shape {tuple(here.shape[1:])} per token, captured was "
                f"{tuple(there.shape[1:])}",
            )
        difference = (here - there).square().sum() / there.square().sum().clamp_min(1e-30)
        if float(difference) > LARGEST_DIFFERENCE:
            raise CURVE.unusable(
                settings.directory(),
                f"its {kind.upper()} differs from the captured one by {float(difference):.2g} of "
                "its energy",
            )


def _through(
    codecs: Mapping[range, ChunkCodec], prefix: Prefix
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Bytes of all ranks, and the K and V of all heads as they come back."""
    taken = 0
    k, v = prefix.k.clone(), prefix.v.clone()
    for heads, codec in codecs.items():
        part = slice(heads.start, heads.stop)
        try:
            size, own_k, own_v = round_trip(
                codec, prefix.k[:, :, part], prefix.v[:, :, part], CHUNK_TOKENS
            )
        except CodecError as error:
            raise ArtifactError(f"{CURVE.option}: {prefix.name} is not stored: {error}") from error
        taken += size
        k[:, :, part], v[:, :, part] = own_k, own_v
    return taken, k, v
