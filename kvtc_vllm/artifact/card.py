"""The card of an artifact: what `card.json` holds, for people and for the registry."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvtc_vllm.codec.artifact import Geometry, Kind
from kvtc_vllm.codec.container import MAX_SINK_TOKENS
from kvtc_vllm.codec.errors import ArtifactError

FORMAT_VERSION = 1
CARD_NAME = "card.json"


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
    """

    ratio: float
    predicted: float
    heldout: float
    heldout_plain: float | msgspec.UnsetType = msgspec.UNSET


class SectionCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """K or V of one layer group on one rank.

    row_size: elements per row. basis_rank: columns of the basis.
    errors: one per ratio.
    """

    rank: int
    group: int
    kind: Kind
    row_size: int
    basis_rank: int
    errors: tuple[ErrorCard, ...]


class SensitivityCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What rows were weighted by; the weights themselves are in the rank files.

    method: how sensitivities were found, "gradient".
    documents: numbers of the calibration documents they were found on.
    tokens: of these, over which was averaged.
    seed: of what was drawn.
    key_weights, value_weights: one per layer.
    """

    method: str
    documents: tuple[int, ...]
    tokens: int
    seed: int
    key_weights: tuple[float, ...]
    value_weights: tuple[float, ...]


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
    method: how the basis was found, see `kvtc_vllm.calibration.pca`.
    seconds: of fitting all ranks.
    key_share: see `kvtc_vllm.calibration.fit_settings.FitSettings`.
    sensitivity: unset if rows are not weighted.
    cache_groups: of a model with several, all of them; unset if there is one. The card is of the
    first, cards of the others lie in `directory.group_directory`.
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
    cache_groups: tuple[CacheGroupCard, ...] | msgspec.UnsetType = msgspec.UNSET
    format_version: int = FORMAT_VERSION


def cache_groups(card: ArtifactCard) -> tuple[CacheGroupCard, ...]:
    """Of a model with several; none if there is one."""
    return () if card.cache_groups is msgspec.UNSET else card.cache_groups


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
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}; this is not an artifact") from error
    try:
        # The version comes first, or a newer format would be reported as an unknown field.
        version = msgspec.json.decode(data, type=_Versioned).format_version
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"{path}: format_version is {version}, this program reads {FORMAT_VERSION}"
            )
        card = msgspec.json.decode(data, type=ArtifactCard)
    except (msgspec.MsgspecError, ValueError) as error:
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
    return card


class _Versioned(msgspec.Struct):
    format_version: int
