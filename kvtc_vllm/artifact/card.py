"""The card of an artifact: what `card.json` holds, for people and for the registry."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvtc_vllm.codec.artifact import Geometry, Kind
from kvtc_vllm.codec.container import MAX_SINK_TOKENS
from kvtc_vllm.codec.errors import ArtifactError

FORMAT_VERSION = 1
CARD_NAME = "card.json"


class GeometryCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kvtc_vllm.codec.artifact.Geometry` of one rank, as JSON."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    layer_groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, geometry: Geometry) -> GeometryCard:
        """The same numbers as a card."""
        return cls(
            num_layers=geometry.num_layers,
            num_kv_heads=geometry.num_kv_heads,
            head_size=geometry.head_size,
            head_size_v=geometry.head_size_v,
            layer_groups=geometry.layer_groups,
        )

    def geometry(self) -> Geometry:
        """The same numbers as the codec's value. Raises ValueError for an impossible shape."""
        sizes = (self.num_layers, self.num_kv_heads, self.head_size, self.head_size_v)
        if min(sizes) < 1:
            raise ValueError(f"geometry {sizes} has a size below 1")
        return Geometry(*sizes, layer_groups=self.layer_groups)


class DataCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an artifact was fitted on.

    files: names without directories. tokens: all tokens run through the
    model. train_tokens, heldout_tokens: those sampled for the fit and for
    measuring it. seed: of sampling and fitting.
    """

    files: tuple[str, ...]
    tokens: int
    train_tokens: int
    heldout_tokens: int
    seed: int


class ErrorCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Relative squared errors of one section at one ratio."""

    ratio: float
    predicted: float
    heldout: float


class SectionCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """K or V of one layer group on one rank."""

    rank: int
    group: int
    kind: Kind
    row_size: int
    basis_rank: int
    errors: tuple[ErrorCard, ...]


class ArtifactCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One artifact directory.

    identity, config_fingerprint, weights_fingerprint: see
    `kvtc_vllm.artifact.identity`. geometry: of one rank; all ranks have the
    same. fingerprints: hex, one a rank, see
    `kvtc_vllm.artifact.fingerprint`. rope_fingerprints: hex, one a table.
    kv_dtype: cache dtype that was captured. size_bytes, checksums: rank file
    name -> bytes, and hex of xxh3-128 of the whole file. created: UTC, ISO
    8601. seconds: of fitting all ranks. key_share: see
    `kvtc_vllm.calibration.fit.FitSettings`.
    """

    model_name: str
    identity: str
    config_fingerprint: str
    weights_fingerprint: str
    tp_size: int
    fingerprints: tuple[str, ...]
    rope_fingerprints: tuple[str, ...]
    kv_dtype: str
    geometry: GeometryCard
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
    format_version: int = FORMAT_VERSION


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
        card.geometry.geometry()
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
