"""What computes KV beside the model's configuration and weights: other files and code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from kvtc_vllm.artifact.identity import model_directory, model_identity

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ForeignCodeError(Exception):
    """A model's code is in another repository, so nobody here can tell when it changes."""


def _draft_files(vllm_config: VllmConfig) -> str | None:
    """Of a draft model, whose layers share the cache; None without one."""
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    target = vllm_config.model_config
    if draft is None or (draft.model, draft.revision) == (target.model, target.revision):
        return None
    return model_identity(draft.model, draft.revision).identity


def _model_code(vllm_config: VllmConfig) -> str | None:
    """Of a model's own code, if it may run; None if it may not or there is none.

    Raises ForeignCodeError if the configuration names code of another repository.
    """
    model = vllm_config.model_config
    if not getattr(model, "trust_remote_code", False):
        return None
    for name, place in (getattr(model.hf_config, "auto_map", None) or {}).items():
        # Of tokenizers there are two, a slow one and a fast one.
        for code in place if isinstance(place, list | tuple) else (place,):
            if code is not None and "--" in code:
                raise ForeignCodeError(f"auto_map: {name} is {code}")
    return _digest(sorted(model_directory(model.model, model.revision).rglob("*.py")))


def _media_files(vllm_config: VllmConfig) -> str | None:
    """Of what makes numbers of images, video and sound; None for a model of text."""
    model = vllm_config.model_config
    if getattr(model, "multimodal_config", None) is None:
        return None
    directory = model_directory(model.model, model.revision)
    return _digest(sorted(directory.glob("*processor_config.json")))


def _transformers(vllm_config: VllmConfig) -> str | None:
    """Release of transformers, where its code computes the model or reads media."""
    model = vllm_config.model_config
    computes = str(getattr(model, "architecture", "")).startswith("Transformers")
    reads = getattr(model, "multimodal_config", None) is not None
    return version("transformers") if computes or reads else None


ALWAYS: dict[str, Callable[[VllmConfig], str | None]] = {
    "draft_files": _draft_files,
    "model_code": _model_code,
}
WHERE_IT_IS_SO: dict[str, Callable[[VllmConfig], str | None]] = {
    "media_files": _media_files,
    "transformers": _transformers,
}
"""No facts where they are None: what is on disk from before such a fact keeps its name.

All raise ArtifactError or OSError for a model that is not there or can't be read, and
ForeignCodeError.
"""


def _digest(files: Sequence[Path]) -> str | None:
    digest = xxhash.xxh3_128()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest() if files else None
