"""An artifact's directory, and loading one rank of it.

ROOT/<model-slug>/<artifact-name>/
    card.json                  `kvtc_vllm.artifact.card`
    rank{r}of{n}.safetensors   `kvtc_vllm.artifact.rank_file`
    report.md  report.png      for people
    group1/ ...                the same of further cache groups, where the model has several
"""

from __future__ import annotations

from pathlib import Path

import xxhash

from kvtc_vllm.artifact.card import ArtifactCard, load_card
from kvtc_vllm.artifact.rank_file import Probe, rank_file_name, read_rank_file
from kvtc_vllm.artifact.regular_file import open_regular
from kvtc_vllm.artifact.text import printable
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.errors import ArtifactError

_READ_BYTES = 16 * 2**20


def group_directory(directory: Path, number: int) -> Path:
    """Where the card and the rank files of a cache group are; the first is the artifact's own."""
    return Path(directory) if number == 0 else Path(directory) / f"group{number}"


def load_rank_artifact(directory: Path, rank: int) -> tuple[RankArtifact, ArtifactCard, Probe]:
    """Load one tensor-parallel rank of an artifact.

    Raises ArtifactError, one clear line naming file and field, for anything
    missing, malformed or contradictory.
    """
    directory = Path(directory)
    card = load_card(directory)
    if not 0 <= rank < card.tp_size:
        raise ArtifactError(f"{directory}: has ranks 0..{card.tp_size - 1}, not {rank}")
    path = directory / rank_file_name(rank, card.tp_size)
    _check_file(path, card)
    artifact, probe = read_rank_file(path, rank, card.tp_size)
    for field, in_card, in_file in (
        ("fingerprints", card.fingerprints[rank], artifact.fingerprint.hex()),
        ("geometry", card.geometry, artifact.geometry),
        ("sink_tokens", card.sink_tokens, artifact.sink_tokens),
        ("ratios", card.ratios, artifact.ratios()),
        ("rope_fingerprints", card.rope_fingerprints, rope_fingerprints(artifact)),
    ):
        if in_card != in_file:
            raise ArtifactError(f"{path}: {field} is {in_file}, card.json says {in_card}")
    return artifact, card, probe


def checksum(path: Path) -> str:
    """Hex of xxh3-128 of a whole file, as the card has it."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def rope_fingerprints(artifact: RankArtifact) -> tuple[str, ...]:
    """Hex, one per table, as the card has them."""
    return tuple(rope.fingerprint().hex() for rope in artifact.ropes)


def _check_file(path: Path, card: ArtifactCard) -> None:
    if path.name not in card.checksums:
        raise ArtifactError(f"{path.parent}: checksums in card.json do not name {path.name}")
    expected = card.size_bytes[path.name]
    try:
        with open_regular(path, expected) as (_, size):
            found = checksum(path) if size == expected else ""
    except ArtifactError as error:
        raise ArtifactError(f"{error}; the artifact is incomplete or damaged") from error
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}; the artifact is incomplete") from error
    if size != expected:
        raise ArtifactError(f"{path}: damaged: {size} bytes, card.json says {expected}")
    if found != card.checksums[path.name]:
        raise ArtifactError(
            f"{path}: damaged: checksum {found}, card.json says "
            f"{printable(card.checksums[path.name])}"
        )
