"""The card of an artifact: what `card.json` holds, for people and for the registry."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvtc_vllm.artifact.regular_file import read_regular
from kvtc_vllm.codec.artifact import Geometry, SectionName
from kvtc_vllm.codec.container import MAX_SINK_TOKENS
from kvtc_vllm.codec.errors import ArtifactError

FORMAT_VERSION = 1
CARD_NAME = "card.json"
UNNAMED_CODEC = "kvtc"
"""Its cards and rank files do not name it: they were written before there were others."""
MAX_CARD_BYTES = 2**24


class DataCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an artifact was fitted on.

    files: names without directories.
    tokens: all tokens that were run through the model.
    train_tokens: those sampled for the fit.
    heldout_tokens: those sampled for measuring it.
    seed: of sampling and fitting.
    """

    files: tuple[str, ...]
    tokens: int
    train_tokens: int
    heldout_tokens: int
    seed: int


class ErrorCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Relative squared errors of one section at one ratio.

    ratio: target ratio.
    predicted: on the rows that the plan was made for.
    heldout: on rows that the fit has not seen.
    heldout_plain: the same without the weights that rows are multiplied by; the other two are with
    them. Unset if there are none.
    token_bytes: bytes per token on calibration data in chunks of 128, everything but headers and
    sinks counted; of codec 2.
    """

    ratio: float
    predicted: float
    heldout: float
    heldout_plain: float | msgspec.UnsetType = msgspec.UNSET
    token_bytes: float | msgspec.UnsetType = msgspec.UNSET


class SectionCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """K, V or both of one layer group on one rank.

    row_size: elements per row. basis_rank: columns of the basis.
    errors: one per ratio.
    """

    rank: int
    group: int
    kind: SectionName
    row_size: int
    basis_rank: int
    errors: tuple[ErrorCard, ...]


class SensitivityCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What rows were weighted by; the weights themselves are in the rank files.

    method: how sensitivities were found, "gradient" or "probe".
    documents: numbers of the calibration documents they were found on.
    tokens: of these, over which was averaged.
    seed: of what was drawn.
    key_weights, value_weights: one per layer; root mean square over heads.
    averaged: over "all" tokens, or over "ordinary" ones, sinks left out.
    metric: a weight per "layer", or per layer and KV "head".
    key_head_weights, value_head_weights: per layer, per KV head of all ranks; unset unless heads
    have weights of their own.
    marked_share, marked_energy: of those tokens, the sinks among them, and their share of the sum
    of all squared gradients; unset if the model has no floating sinks.
    """

    method: str
    documents: tuple[int, ...]
    tokens: int
    seed: int
    key_weights: tuple[float, ...]
    value_weights: tuple[float, ...]
    averaged: str = "all"
    metric: str = "layer"
    key_head_weights: tuple[tuple[float, ...], ...] | msgspec.UnsetType = msgspec.UNSET
    value_head_weights: tuple[tuple[float, ...], ...] | msgspec.UnsetType = msgspec.UNSET
    marked_share: float | msgspec.UnsetType = msgspec.UNSET
    marked_energy: float | msgspec.UnsetType = msgspec.UNSET


class SinkCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Floating attention sinks that the rows of one rank show.

    layers, threshold, max_share: see `kvtc_vllm.codec.sink_rule.SinkRule`.
    separation: nats between the two modes of the mean log norm of values.
    valley: density at the threshold over that of the lower mode.
    train_share, heldout_share: of the tokens, how many lie below the threshold.
    documents: share of the documents in which one does.
    """

    rank: int
    layers: tuple[int, ...]
    threshold: float
    max_share: float
    separation: float
    valley: float
    train_share: float
    heldout_share: float
    documents: float


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a target ratio costs on held-out documents.

    real_ratio: of whole blobs. kl: divergence from exact runs, nats per token, mean over documents;
    low, high: 95 % of it.
    """

    ratio: float
    real_ratio: float
    kl: float
    low: float
    high: float


class CurveCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured quality of an artifact, all ranks together.

    documents: numbers of the held-out documents.
    prefix_tokens, exact_tokens, scored_tokens: of a document, at most: through blobs, computed
    exactly after them, and compared.
    chunk_tokens: of the blobs. points: one per ratio.
    """

    documents: tuple[int, ...]
    prefix_tokens: int
    exact_tokens: int
    scored_tokens: int
    chunk_tokens: int
    points: tuple[CurvePoint, ...]


class CacheGroupCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Layers that are stored together, see `kvtc_vllm.offload.geometry.CacheGroup`.

    attention: "full", "window 512" or "local 8192", in tokens.
    layers: their numbers in the model, ascending.
    """

    attention: str
    layers: tuple[int, ...]


class ArtifactCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One artifact directory.

    model_name: for people; artifacts are found by `identity`.
    identity, config_fingerprint, weights_fingerprint: of the model, see
    `kvtc_vllm.artifact.identity`.
    tp_size: tensor-parallel ranks.
    fingerprints: hex, one per rank, see `kvtc_vllm.artifact.fingerprint`.
    rope_fingerprints: hex, one per RoPE table.
    kv_dtype: cache dtype that was captured.
    geometry: of one rank; all ranks have the same.
    sink_tokens: first positions that are stored exactly.
    data: what was fitted on.
    ratios: target ratios, ascending.
    sections: all sections of all ranks.
    size_bytes: rank file name -> bytes.
    checksums: rank file name -> hex of xxh3-128 of the whole file.
    created: UTC, ISO 8601.
    versions: package -> version that fitted.
    codec: a name in `kvtc_vllm.codec.registry.CODECS`; unset for "kvtc".
    method: how the basis was found, see `kvtc_vllm.calibration.pca`.
    seconds: of fitting all ranks.
    key_share: see `kvtc_vllm.calibration.fit_settings.FitSettings`.
    sensitivity: unset if rows are not weighted.
    sinks: one per rank whose rows show floating sinks, none if none does; unset if nobody looked.
    cache_groups: of a model with several, all of them; unset if there is one. The card is of the
    first, cards of the others lie in `directory.group_directory`.
    curve: what the ratios cost; unset if it was not measured.
    """

    model_name: str
    identity: str
    config_fingerprint: str
    weights_fingerprint: str
    tp_size: int
    fingerprints: tuple[str, ...]
    rope_fingerprints: tuple[str, ...]
    kv_dtype: str
    geometry: Geometry
    sink_tokens: int
    data: DataCard
    ratios: tuple[float, ...]
    sections: tuple[SectionCard, ...]
    size_bytes: dict[str, int]
    checksums: dict[str, str]
    created: str
    versions: dict[str, str]
    method: str
    seconds: float
    key_share: float | None = None
    sensitivity: SensitivityCard | msgspec.UnsetType = msgspec.UNSET
    sinks: tuple[SinkCard, ...] | msgspec.UnsetType = msgspec.UNSET
    codec: str | msgspec.UnsetType = msgspec.UNSET
    cache_groups: tuple[CacheGroupCard, ...] | msgspec.UnsetType = msgspec.UNSET
    curve: CurveCard | msgspec.UnsetType = msgspec.UNSET
    format_version: int = FORMAT_VERSION

    @property
    def codec_name(self) -> str:
        """Of the codec that the plans are of. Cards of `UNNAMED_CODEC` do not say."""
        return UNNAMED_CODEC if self.codec is msgspec.UNSET else self.codec


def cache_groups(card: ArtifactCard) -> tuple[CacheGroupCard, ...]:
    """Of a model with several; none if there is one."""
    return () if card.cache_groups is msgspec.UNSET else card.cache_groups


def ratio_within(card: ArtifactCard, quality: float) -> float | None:
    """The highest ratio of which a KL of at most `quality` was measured; None if there is none.

    quality: nats per token.
    """
    points = () if card.curve is msgspec.UNSET else card.curve.points
    return max((point.ratio for point in points if point.kl <= quality), default=None)


def save_card(directory: Path, card: ArtifactCard) -> None:
    """Write `card.json` into an artifact directory."""
    text = msgspec.json.format(msgspec.json.encode(card), indent=1)
    (directory / CARD_NAME).write_bytes(text + b"\n")


def load_card(directory: Path) -> ArtifactCard:
    """Read and check the card of an artifact directory.

    Raises ArtifactError, naming the file and the field, if it is missing,
    malformed, of another format version, or contradicts itself.
    """
    path = Path(directory) / CARD_NAME
    try:
        data = read_regular(path, MAX_CARD_BYTES)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; this is not an artifact") from error
    try:
        # The version comes first, or a newer format would be reported as an unknown field.
        version = msgspec.json.decode(data, type=_Versioned).format_version
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"{path}: format_version is {version}, this program reads {FORMAT_VERSION}"
            )
        card = msgspec.json.decode(data, type=ArtifactCard)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    if not 0 <= card.sink_tokens <= MAX_SINK_TOKENS:
        raise ArtifactError(
            f"{path}: sink_tokens is {card.sink_tokens}, 0 to {MAX_SINK_TOKENS} are right"
        )
    if card.size_bytes.keys() != card.checksums.keys():
        raise ArtifactError(f"{path}: size_bytes and checksums name different files")
    if card.tp_size < 1 or len(card.fingerprints) != card.tp_size:
        raise ArtifactError(
            f"{path}: tp_size is {card.tp_size} but fingerprints has {len(card.fingerprints)}"
        )
    if card.curve is not msgspec.UNSET:
        measured = tuple(point.ratio for point in card.curve.points)
        if measured != card.ratios:
            raise ArtifactError(
                f"{path}: curve is of ratios {measured}, the plans of {card.ratios}"
            )
    return card


class _Versioned(msgspec.Struct):
    format_version: int
