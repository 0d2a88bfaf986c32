"""Finding the artifact of a model.

A registry is a directory of <model-slug>/<artifact-name>/card.json, or a
repository `hf:ORG/REPO@COMMIT` that is laid out so (`hub.py`). Searched,
in this order, until one holds a match: the configured directories; those in
the environment variable KVTC_REGISTRY; the user's; the ones shipped with this
package. Within one registry the newest match wins; if a quality is asked for, the one that has
it at the highest ratio.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

import kvtc_vllm
from kvtc_vllm.artifact.card import (
    CARD_NAME,
    UNNAMED_CODEC,
    ArtifactCard,
    CacheGroupCard,
    cache_groups,
    load_card,
    ratio_within,
)
from kvtc_vllm.artifact.hub import hub_registry, is_hub_name
from kvtc_vllm.artifact.identity import ModelIdentity
from kvtc_vllm.artifact.text import printable
from kvtc_vllm.codec.errors import ArtifactError

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "KVTC_REGISTRY"
_LISTED = 20
"""At most this many artifacts are named in the message of a failed search."""


@dataclass(frozen=True)
class Wanted:
    """What an artifact must fit. codec: None for any. groups: cache groups, none where there is
    one; None for any. quality: instead of a ratio, see `find`. model_name is only used in
    messages."""

    identity: ModelIdentity
    tp_size: int
    ratio: float | None
    model_name: str
    codec: str | None = None
    groups: tuple[CacheGroupCard, ...] | None = None
    quality: float | None = None

    @property
    def target(self) -> str:
        """Ratio or quality, in words."""
        if self.quality is not None:
            return f"quality {self.quality:g}"
        return f"ratio {self.ratio:g}x"


def user_registry() -> Path | None:
    """The user's own registry, under XDG_DATA_HOME; None for a user without a home."""
    try:
        home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    except RuntimeError:  # as in a container that runs under any number
        return None
    return Path(home) / "kvtc" / "calibrations"


def shipped_registry() -> Path:
    """Artifacts that come with this package: inside a wheel, or in the source tree."""
    package = Path(kvtc_vllm.__file__).parent
    inside = package / "_calibrations"
    return inside if inside.is_dir() else package.parent / "calibrations"


def search_path(configured: Sequence[str | Path] = ()) -> list[Path]:
    """Registry directories in search order, each once, whether they exist or not.

    Raises ArtifactError for a hub repository that can't be had: whoever names one wants it.
    """
    named = [*configured, *_environment()]
    directories = [
        hub_registry(str(part)) if is_hub_name(part) else Path(part).expanduser() for part in named
    ]
    own = [path for path in (user_registry(), shipped_registry()) if path is not None]
    return list(dict.fromkeys([*directories, *own]))


def _environment() -> list[str]:
    """Entries of KVTC_REGISTRY. The separator is also in the name of a hub repository."""
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    return [part for part in re.split(rf"(?<!\bhf){os.pathsep}", text) if part]


def find(
    identity: ModelIdentity,
    tp_size: int,
    ratio: float | None,
    *,
    model_name: str,
    codec: str | None = None,
    quality: float | None = None,
    artifact: str | Path | None = None,
    registries: Sequence[str | Path] = (),
    groups: tuple[CacheGroupCard, ...] | None = None,
) -> Path:
    """Directory of the artifact to use.

    artifact: use this directory and search nowhere. It must fit like a found
    one, except that other weights are only warned about: whoever names an
    artifact may know that it serves a fine-tuned model as well.
    ratio: that it has a plan for. quality: instead, nats per token: that it has a plan whose
    measured KL is at most this (`card.ratio_within`).
    registries: directories to search first. model_name: as the user names the
    model, for messages. codec: only artifacts of this one. groups: of the
    engine's cache, none if it has one; None where no engine is.

    Raises ArtifactError that says what was found, why it does not fit, where
    the search went, and the command that makes what is missing.
    """
    wanted = Wanted(identity, tp_size, ratio, model_name, codec, groups, quality)
    if artifact is not None:
        return _explicit(Path(artifact), wanted)
    directories = search_path(registries)
    rejected: list[tuple[Path, ArtifactCard, list[str]]] = []
    for registry in directories:
        matches: list[tuple[float, str, Path]] = []
        for directory, card in scan(registry):
            reasons = mismatches(card, wanted)
            if reasons:
                rejected.append((directory, card, reasons))
            else:
                reached = None if quality is None else ratio_within(card, quality)
                matches.append((reached or 0.0, card.created, directory))
        if matches:
            return max(matches)[-1]
    raise ArtifactError(_not_found(wanted, rejected, directories))


def scan(registry: Path) -> Iterator[tuple[Path, ArtifactCard]]:
    """Artifacts of one registry, by path. Broken ones are logged and left out."""
    try:
        paths = sorted(registry.glob(f"*/*/{CARD_NAME}"))
    except OSError as error:  # not ours to read, or a disk that fails
        logger.warning("registry ignored: %s: %s", registry, error.strerror)
        return
    for path in paths:
        # Directories being written or replaced have names that start with a dot.
        if path.parent.name.startswith("."):
            continue
        try:
            yield path.parent, load_card(path.parent)
        except ArtifactError as error:
            logger.warning("artifact ignored: %s", printable(str(error)))


def mismatches(card: ArtifactCard, wanted: Wanted) -> list[str]:
    """Why an artifact does not fit; empty if it does."""
    reasons = []
    same_config = card.config_fingerprint == wanted.identity.config
    same_weights = card.weights_fingerprint == wanted.identity.weights
    if not same_config and not same_weights:
        reasons.append("another model")
    elif not same_weights:
        reasons.append("same configuration, other weights")
    elif not same_config:
        reasons.append("same weights, other configuration")
    if card.tp_size != wanted.tp_size:
        reasons.append(f"calibrated for TP {card.tp_size}, this is TP {wanted.tp_size}")
    if wanted.codec not in (None, card.codec_name):
        reasons.append(
            f"calibrated for codec {card.codec_name}, this is {wanted.codec}; "
            f"codec={card.codec_name!r} serves it"
        )
    if wanted.groups is not None and cache_groups(card) != wanted.groups:
        there, here = _groups(cache_groups(card)), _groups(wanted.groups)
        reasons.append(f"calibrated for {there}, this engine has {here}")
    if wanted.quality is not None:
        reasons += _not_within(card, wanted.quality)
    elif wanted.ratio is not None and wanted.ratio not in card.ratios:
        reasons.append(f"no plan for {wanted.ratio:g}x, only {_ratios(card.ratios)}")
    return reasons


def _not_within(card: ArtifactCard, quality: float) -> list[str]:
    """Why no plan is known to be as good; empty if one is."""
    if card.curve is msgspec.UNSET:
        return ["no measured curve of quality; --quality-curve measures one"]
    if ratio_within(card, quality) is not None:
        return []
    best = min(card.curve.points, key=lambda point: point.kl)
    return [f"no plan with a KL of at most {quality:g}, the best is {best.ratio:g}x: {best.kl:.2g}"]


def calibrate_command(wanted: Wanted) -> str:
    """The command that would make the artifact."""
    codec = "" if wanted.codec in (None, UNNAMED_CODEC) else f" --codec {wanted.codec}"
    curve = "" if wanted.quality is None else " --quality-curve"
    command = f"kvtc calibrate {wanted.model_name} --data TEXT_FILES --tp {wanted.tp_size}"
    return f"{command}{codec}{curve}"


def _explicit(directory: Path, wanted: Wanted) -> Path:
    card = load_card(directory)
    reasons = mismatches(card, wanted)
    other_weights = "same configuration, other weights"
    if other_weights in reasons:
        reasons.remove(other_weights)
        logger.warning(
            "artifact %s was calibrated on other weights of the same architecture (%s); "
            "its held-out error may not hold",
            directory,
            printable(card.model_name),
        )
    if reasons:
        raise ArtifactError(
            f"artifact {directory} ({printable(card.model_name)}) does not fit "
            f"{wanted.model_name}: {'; '.join(reasons)}. To make one that does: "
            f"{calibrate_command(wanted)}"
        )
    return directory


def _not_found(
    wanted: Wanted,
    rejected: Sequence[tuple[Path, ArtifactCard, list[str]]],
    directories: Sequence[Path],
) -> str:
    lines = [
        f"no KVTC artifact fits {wanted.model_name} (identity {wanted.identity.identity}, "
        f"TP {wanted.tp_size}, {wanted.target})"
    ]
    # Nearest first: the fewest reasons, then those that are the same model.
    nearest = sorted(rejected, key=lambda entry: (len(entry[2]), "another model" in entry[2]))
    for directory, card, reasons in nearest[:_LISTED]:
        lines.append(
            f"  found {printable(card.model_name)} (identity {printable(card.identity)}, "
            f"TP {card.tp_size}, {_ratios(card.ratios)}) in {directory}: {'; '.join(reasons)}"
        )
    if len(nearest) > _LISTED:
        lines.append(f"  and {len(nearest) - _LISTED} more that fit less")
    if not nearest:
        lines.append("  found no artifact at all")
    lines += [f"  searched {directory}{_absent(directory)}" for directory in directories]
    lines.append(f"  to make one: {calibrate_command(wanted)}")
    return "\n".join(lines)


def _absent(directory: Path) -> str:
    return "" if directory.is_dir() else " (does not exist)"


def _groups(groups: Sequence[CacheGroupCard]) -> str:
    if not groups:
        return "one cache group"
    named = (f"{group.attention}, {len(group.layers)} layers" for group in groups)
    return f"{len(groups)} cache groups ({'; '.join(named)})"


def _ratios(ratios: Sequence[float]) -> str:
    return ", ".join(f"{ratio:g}x" for ratio in ratios)
