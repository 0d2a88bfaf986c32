"""Which model this is: a fingerprint of its configuration and of its weights.

Weight files of 4 GiB or less in total are hashed whole. Larger ones are
sampled: of a safetensors file the header (names, shapes, dtypes, offsets) and
256 bytes at the start, middle and end of every tensor; of other formats the
size and 64 regions spread over the file. Sampling tells apart different
checkpoints, fine-tunes, merges and quantisations, which change practically
every tensor throughout. It cannot see an edit confined to bytes between the
samples, and no fingerprint here is meant to stop somebody who forges one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

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
_SAMPLE_BYTES = 256
_REGIONS = 64
_READ_BYTES = 16 * 2**20
_MAX_HEADER_BYTES = 100 * 2**20

_cache: dict[tuple[tuple[str, int, int], ...], str] = {}


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

    Nothing is downloaded. Weights are read once a process: results are kept by
    path, size and modification time. Raises ArtifactError if there is no such
    model or its configuration or a weight file cannot be read.
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
    stats = [path.stat() for path in files]
    key = tuple(
        (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        for path, stat in zip(files, stats, strict=True)
    )
    whole = sum(stat.st_size for stat in stats) <= full_hash_limit
    key = (*key, ("whole" if whole else "sampled", 0, 0))
    if key not in _cache:
        digest = xxhash.xxh3_128()
        for path in files:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            try:
                with path.open("rb") as file:
                    for part in _whole(file) if whole else _sampled(file, path):
                        digest.update(part)
            except OSError as error:
                raise ArtifactError(f"{path}: {error}") from error
        _cache[key] = digest.hexdigest()
    return _cache[key]


def weight_files(directory: Path) -> list[Path]:
    """Weight files of a model directory, sorted by name."""
    found = sorted(
        path
        for path in directory.iterdir()
        if path.suffix in _WEIGHT_SUFFIXES and path.name not in _NOT_WEIGHTS and path.is_file()
    )
    safetensors = [path for path in found if path.suffix == ".safetensors"]
    return safetensors or found


def _whole(file: BinaryIO) -> Iterator[bytes]:
    while part := file.read(_READ_BYTES):
        yield part


def _sampled(file: BinaryIO, path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        for i in range(_REGIONS):
            file.seek(max(0, size - _SAMPLE_BYTES) * i // (_REGIONS - 1))
            yield file.read(_SAMPLE_BYTES)
        return
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise ArtifactError(f"{path}: safetensors header length {length} is out of bounds")
    header = file.read(length)
    yield header
    try:
        entries = json.loads(header)
        spans = sorted(
            (int(start), int(end))
            for name, entry in entries.items()
            if name != "__metadata__"
            for start, end in [entry["data_offsets"]]
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path}: safetensors header is malformed: {error!r}") from error
    for start, end in spans:
        last = max(start, end - _SAMPLE_BYTES)
        for offset in (start, (start + last) // 2, last):
            file.seek(8 + length + offset)
            yield file.read(min(_SAMPLE_BYTES, end - start))
