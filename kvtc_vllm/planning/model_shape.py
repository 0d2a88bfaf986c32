"""Bytes of KV per token, from a model's `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvtc_vllm.planning.errors import PlanError

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "auto": 2}
_OTHER_CACHES = ("kv_lora_rank", "layer_types", "sliding_window", "layers_block_type")


def kv_bytes_per_token(config: Path) -> int:
    """Uncompressed, over all layers and tensor-parallel ranks.

    config: a model directory or its `config.json`. Raises PlanError for a model whose cache is not
    K and V of every layer for every token; the caller may give the number itself.
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
    text = found.get("text_config", found)
    for name in _OTHER_CACHES:
        if _matters(name, text.get(name), text):
            raise PlanError(
                f"{path}: {name} says that not every layer caches K and V of every token; "
                "give the bytes yourself: --kv-bytes-per-token"
            )
    try:
        layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        size = int(text.get("head_dim") or text["hidden_size"] // heads)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{path}: {error} is missing or no number") from error
    dtype = str(text.get("dtype") or text.get("torch_dtype") or found.get("torch_dtype") or "auto")
    if dtype not in _BYTES:
        raise PlanError(f"{path}: dtype is {dtype!r}, one of {', '.join(_BYTES)} is right")
    return 2 * layers * kv_heads * size * _BYTES[dtype]


def _matters(name: str, value: Any, config: dict[str, Any]) -> bool:
    if name == "layer_types":
        return bool(value) and set(value) != {"full_attention"}
    if name == "sliding_window":
        # Several models name a window that they do not use.
        return bool(value) and config.get("use_sliding_window", True) is True
    return bool(value)
