"""Registries on the Hugging Face hub: `hf:ORG/REPO@COMMIT`.

A repository is laid out as a registry is: <model-slug>/<artifact-name>/card.json and rank files. Of
it nothing but cards and safetensors is downloaded. The commit is part of the name, because an
artifact decides what stored bytes mean: nobody but whoever runs the engine may exchange it. What
is in the local cache of huggingface_hub is used without asking the hub.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtc_vllm.artifact.card import CARD_NAME, ArtifactCard, load_card
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.codec.errors import ArtifactError

PREFIX = "hf:"
PATTERNS = ["*/*/card.json", "*/*/rank*of*.safetensors"]
"""All that is downloaded."""
_FOR_PEOPLE = ("report.md", "report.png", "quality.md")
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+?)(?:@([^@\s]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """repository: ORG/REPO. revision: what follows the @, if anything."""

    repository: str
    revision: str | None


def is_hub_name(place: str | Path) -> bool:
    """True for what begins with `hf:`."""
    return str(place).startswith(PREFIX)


def parse_name(text: str) -> HubName:
    """Raises ArtifactError for what is no name of a hub repository."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise ArtifactError(f"{text!r} names no hub repository, hf:ORG/REPO@COMMIT is right")
    return HubName(match.group(1), match.group(2))


def hub_registry(text: str) -> Path:
    """A directory with the registry, from the local cache or downloaded. Any process.

    Raises ArtifactError, one sentence, if the name has no commit, the hub cannot be reached, it has
    no such repository or commit, or that holds no artifact.
    """
    name = parse_name(text)
    if name.revision is None or not _COMMIT.fullmatch(name.revision):
        raise ArtifactError(_unpinned(text, name))
    cached = _cached(name)
    if cached is not None:
        return cached
    directory = _download(text, name)
    if not list(directory.glob(f"*/*/{CARD_NAME}")):
        raise ArtifactError(f"{text}: the repository holds no KVTC artifact")
    return directory


def publish(directory: Path, text: str, *, private: bool = False) -> str:
    """Upload an artifact, with its card and report as the model card; returns the pinned name.

    Every rank file is loaded and checked before. Raises ArtifactError if it is damaged, the name is
    wrong or the hub refuses.
    """
    hub = _hub()
    name = parse_name(text)
    if name.revision is not None:
        raise ArtifactError(f"{text}: publishing makes a new commit, {PREFIX}ORG/REPO is right")
    card = load_card(directory)
    for rank in range(card.tp_size):
        load_rank_artifact(directory, rank)
    resolved = directory.resolve()
    place = f"{resolved.parent.name}/{resolved.name}"
    files = [CARD_NAME, *card.size_bytes]
    files += [extra for extra in _FOR_PEOPLE if (directory / extra).is_file()]
    operations: list[Any] = [
        hub.CommitOperationAdd(f"{place}/{file}", str(directory / file)) for file in files
    ]
    readme = model_card(directory, card, name.repository, place)
    operations.append(hub.CommitOperationAdd("README.md", readme.encode()))
    api = hub.HfApi(library_name="kvtc-vllm")
    try:
        api.create_repo(name.repository, private=private, exist_ok=True)
        commit = api.create_commit(
            name.repository, operations, commit_message=f"KVTC artifact {place}"
        )
    except Exception as error:
        # Whatever its HTTP library raises, and its own.
        raise ArtifactError(f"{text}: the hub refused it: {_first_line(error)}") from error
    return f"{PREFIX}{name.repository}@{commit.oid}"


def model_card(directory: Path, card: ArtifactCard, repository: str, place: str) -> str:
    """README.md of the repository: how to serve with it, held-out errors, and the report."""
    ratios = ", ".join(f"{ratio:g}x" for ratio in card.ratios)
    lines = ["---", "library_name: kvtc-vllm", "tags: [kv-cache, compression, kvtc, vllm]"]
    if "/" in card.model_name:
        lines.append(f"base_model: {card.model_name}")
    ratio = "" if 16.0 in card.ratios else f"ratio={card.ratios[0]:g} "
    config = f"kvtc config kvtc-16x {ratio}'registry=[{PREFIX}{repository}@COMMIT]'"
    lines += [
        "---",
        "",
        f"# KVTC artifact for {card.model_name}",
        "",
        f"Target ratios {ratios}; {card.tp_size} tensor-parallel rank(s); fitted on "
        f"{card.data.train_tokens:,} tokens. Fits the model with identity `{card.identity}` only.",
        "",
        "```",
        f'vllm serve {card.model_name} --kv-transfer-config "$({config})"',
        "```",
        "",
        "COMMIT is the full hash of the commit to use. The engine checks every file's checksum.",
    ]
    for extra in ("quality.md", "report.md"):
        path = directory / extra
        if path.is_file():
            lines += ["", path.read_text().replace("](report.png)", f"]({place}/report.png)")]
    return "\n".join(lines).rstrip() + "\n"


def _cached(name: HubName) -> Path | None:
    """The snapshot in the local cache, if nothing is missing there."""
    try:
        directory = Path(
            _hub().snapshot_download(
                name.repository,
                revision=name.revision,
                allow_patterns=PATTERNS,
                local_files_only=True,
            )
        )
    except (OSError, ValueError):
        return None
    cards = list(directory.glob(f"*/*/{CARD_NAME}"))
    whole = all(
        (card.parent / file).is_file()
        for card in cards
        for file in load_card(card.parent).size_bytes
    )
    return directory if cards and whole else None


def _download(text: str, name: HubName) -> Path:
    try:
        return Path(
            _hub().snapshot_download(
                name.repository, revision=name.revision, allow_patterns=PATTERNS
            )
        )
    except Exception as error:
        # Whatever its HTTP library raises, and its own, some over several lines.
        raise ArtifactError(f"{text}: cannot be downloaded: {_first_line(error)}") from error


def _unpinned(text: str, name: HubName) -> str:
    wrong = f"{text}: the full hash of a commit must follow, {PREFIX}{name.repository}@COMMIT"
    try:
        info = _hub().HfApi().model_info(name.repository, revision=name.revision)
    except Exception:
        # Only to be helpful; that the name is wrong is known.
        return wrong
    return f"{wrong}; it is now at {PREFIX}{name.repository}@{info.sha}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ArtifactError("hf: names need the huggingface_hub package") from error
    return huggingface_hub
