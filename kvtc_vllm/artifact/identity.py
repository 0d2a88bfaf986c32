"""Which model this is: a fingerprint of its configuration and of its weights.

Weight files of 4 GiB or less in total are hashed whole. Larger ones are
sampled (`sampling.py`): of a safetensors file the header (names, shapes,
dtypes, offsets) and up to 64 KiB of every tensor, in 16 regions from its start
to its end; of other formats the size and such regions spread over the file.
Sampling tells apart different checkpoints, fine-tunes, merges and
quantisations, which change practically every tensor throughout. It cannot see
an edit confined to bytes between the samples, and no fingerprint here is meant
to stop somebody who forges one.

Weights are read once: their fingerprint is remembered in the process and on
disk for as long as the files are the same (`remembered.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from kvtc_vllm.artifact import sampling
from kvtc_vllm.artifact.remembered import FileState, file_state, remember
from kvtc_vllm.codec.errors import ArtifactError

FULL_HASH_LIMIT = 4 * 2**30
"""Weights up to this many bytes in total are hashed whole."""

VOLATILE_KEYS = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype"})
"""Configuration keys that say how a model was saved, not what it computes.

The data type is among them because servers override it; it is part of the
run-time identity through the cache dtype and the RoPE tables.
"""

DUMMY_WEIGHTS = "dummy"
"""Weights fingerprint of a directory without weight files (`--load-format dummy`)."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin")
_READ_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ModelIdentity:
    """config: hex of xxh3-128. weights: hex of xxh3-128, or "dummy"."""

    config: str
    weights: str

    @property
    def identity(self) -> str:
        """Both parts in one string: what an artifact is looked up by."""
        return f"{self.config}-{self.weights}"


def model_identity(model: str | Path, revision: str | None = None) -> ModelIdentity:
    """Identity of a local model directory, or of a hub id already in the local cache.

    Nothing is downloaded. Weights whose fingerprint is remembered are not read.
    Raises ArtifactError if there is no such model, its configuration or a weight
    file cannot be read, or a weight file changes meanwhile.
    """
    directory = model_directory(model, revision)
    return ModelIdentity(config_fingerprint(directory), weights_fingerprint(directory))


def public_model_name(model: str | Path) -> str:
    """A name to publish: the hub id, or the last part of a local path."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else str(model)


def model_directory(model: str | Path, revision: str | None = None) -> Path:
    """Directory of a local path or of a hub id in the local cache. Raises ArtifactError."""
    path = Path(model)
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ArtifactError(
            f'model "{model}" is not a directory, and hub ids need the huggingface_hub package'
        ) from error
    try:
        return Path(snapshot_download(str(model), revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        # huggingface_hub's own messages run over several lines.
        raise ArtifactError(
            f'model "{model}" is neither a directory nor in the local Hugging Face cache'
        ) from error


def config_fingerprint(directory: Path) -> str:
    """xxh3-128 of config.json as canonical JSON, without the top-level `VOLATILE_KEYS`."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path}: holds {type(config).__name__}, an object is right")
    kept = {key: value for key, value in config.items() if key not in VOLATILE_KEYS}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def weights_fingerprint(directory: Path, full_hash_limit: int = FULL_HASH_LIMIT) -> str:
    """xxh3-128 over the weight files in order of name, or "dummy" if there are none.

    Weights in several formats: safetensors files are used, if there are any.
    """
    files = weight_files(directory)
    if not files:
        return DUMMY_WEIGHTS
    states = [_state(path) for path in files]
    whole = sum(state.size for state in states) <= full_hash_limit
    mode = "whole" if whole else f"sampled, version {sampling.VERSION}"
    return remember(states, mode, lambda: _fingerprint(files, states, whole))


def weight_files(directory: Path) -> list[Path]:
    """Weight files of a model directory, sorted by name."""
    found = sorted(
        path
        for path in directory.iterdir()
        if path.suffix in _WEIGHT_SUFFIXES and path.name not in _NOT_WEIGHTS and path.is_file()
    )
    safetensors = [path for path in found if path.suffix == ".safetensors"]
    return safetensors or found


def _state(path: Path) -> FileState:
    with sampling.reading(path):
        return file_state(path)


def _fingerprint(files: Sequence[Path], states: Sequence[FileState], whole: bool) -> str:
    """Read the files. Raises ArtifactError if one is not in its state any more."""
    digest = xxhash.xxh3_128()
    named = [f"{state.name}\0{state.size}\0".encode() for state in states]
    if whole:
        for name, path in zip(named, files, strict=True):
            digest.update(name)
            with sampling.reading(path), path.open("rb") as file:
                for part in _whole(file):
                    digest.update(part)
    else:
        digest.update(b"".join(named))
        sizes = [state.size for state in states]
        for part in sampling.samples(list(zip(files, sizes, strict=True))):
            digest.update(part)
    for path, state in zip(files, states, strict=True):
        if _state(path) != state:
            raise ArtifactError(
                f"{path}: the weight file changed while it was read; start again when it is "
                "complete"
            )
    return digest.hexdigest()


def _whole(file: BinaryIO) -> Iterator[bytes]:
    while part := file.read(_READ_BYTES):
        yield part
