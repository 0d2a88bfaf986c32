"""Bytes of KV per token, from a model's `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from kvtc_vllm.artifact.cache_kinds import (
    ELEMENT_BYTES,
    RefusedLayersError,
    UnknownLayersError,
    layer_kinds,
)
from kvtc_vllm.planning.errors import PlanError

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "auto": 2}
_OF_ALL_TOKENS = {"full", "latent"}
"""Kinds of layers that keep something of every token."""


class TokenBytes(NamedTuple):
    """What all layers keep of one token."""

    size: int
    """Bytes, uncompressed: of K and V over all tensor-parallel ranks, of latents one copy."""
    latent: bool
    """Whether it is latents (MLA), which every rank holds whole."""


def token_bytes(config: Path) -> TokenBytes:
    """Of a model. config: its directory or `config.json`.

    Raises PlanError for a model that does not keep something of every token in every layer; the
    caller may give the number itself.
    """
    path = config / "config.json" if config.is_dir() else config
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PlanError(
            f"{path}: {error}; a model directory or its config.json is right"
        ) from error
    if not isinstance(found, dict):
        raise PlanError(f"{path}: holds {type(found).__name__}, an object is right")
    try:
        kinds = layer_kinds(found)
    except RefusedLayersError as error:
        raise PlanError(f"{path}: {error}") from error
    except UnknownLayersError as error:
        raise PlanError(f"{path}: {error}; give the bytes: --kv-bytes-per-token") from error
    others = [f"{kind.layers} x {kind.kind}" for kind in kinds if kind.kind not in _OF_ALL_TOKENS]
    if others:
        raise PlanError(
            f"{path}: not every layer keeps something of every token: {', '.join(others)}; give "
            "the bytes: --kv-bytes-per-token"
        )
    size = sum(kind.token_bytes for kind in kinds) * _element_bytes(path, found) // ELEMENT_BYTES
    return TokenBytes(size, any(kind.kind == "latent" for kind in kinds))


def _element_bytes(path: Path, config: dict[str, Any]) -> int:
    text = config.get("text_config", config)
    dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "auto")
    if dtype not in _BYTES:
        raise PlanError(f"{path}: dtype is {dtype!r}, one of {', '.join(_BYTES)} is right")
    return _BYTES[dtype]
