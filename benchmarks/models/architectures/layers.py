"""Names of a layer's tensors: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.models.errors import ModelError
from benchmarks.models.gguf_file import GgufFile


def layer_tensor(file: GgufFile, name: str, parts: Mapping[str, str]) -> str:
    """The name that transformers gives a weight of a layer.

    parts: of llama.cpp's name and transformers'. Raises `ModelError` for any other tensor:
    a model without it would be another one.
    """
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in parts:
            return f"model.layers.{layer}.{parts[part]}.weight"
    raise ModelError(
        f"{file.path.name}: tensor {name!r} is not known in architecture {file.architecture!r}"
    )
