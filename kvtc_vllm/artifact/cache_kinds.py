"""What a model's layers keep of a prefix, from its config.json alone: kinds, bytes, expected ratio.

For people, before anything is served. What an engine has is read from vLLM.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ELEMENT_BYTES = 2
"""Of a cache of 16 bits."""
LATENT_RATIO = 8.0
"""Most that a preset codes latents by. Above it only a small trained model was measured, whose
latents are half empty."""
_WINDOWS = ("sliding_attention", "local_attention")
_PERIODS = {
    "gemma2": ("sliding_attention", "sliding_window_pattern", 2),
    "gemma3": ("sliding_attention", "sliding_window_pattern", 6),
    "cohere2": ("sliding_attention", "sliding_window_pattern", 4),
    "llama4": ("chunked_attention", "no_rope_layer_interval", 4),
    "qwen3_next": ("linear_attention", "full_attention_interval", 4),
}
"""Where a configuration does not list its layers: family -> kind of the layers between those of
full attention, field and default of how many layers make a period."""
_LETTERS = {"M": "mamba", "*": "full_attention"}
"""Of Nemotron-H's pattern; its other layers keep nothing."""
_RECURRENT = ("linear_attention", "mamba", "mamba2", "conv", "recurrent")


class UnknownLayersError(ValueError):
    """A configuration that does not say what its layers keep; the message says what lacks."""


class RefusedLayersError(ValueError):
    """A configuration with layers that an engine refuses; the message says which."""


@dataclass(frozen=True)
class LayerKind:
    """Layers of one kind.

    kind: "full", "window 512", "local 8192", "latent" or "state". token_bytes: of one token in all
    of these layers, 16 bits per element. reach: most tokens before a boundary that are needed to go
    on there; None for all. state_bytes: of all of them at one boundary.
    """

    kind: str
    layers: int
    token_bytes: int = 0
    reach: int | None = None
    state_bytes: int = 0

    @property
    def coded(self) -> bool:
        """Whether a codec codes it; states are kept exactly."""
        return self.kind != "state"

    def coded_by(self, ratio: float) -> float:
        """Uncompressed over stored bytes at a target ratio."""
        if not self.coded:
            return 1.0
        return min(ratio, LATENT_RATIO) if self.kind == "latent" else ratio

    def prefix_bytes(self, tokens: int, behind: int) -> int:
        """Uncompressed, of a prefix with one boundary. behind: tokens kept besides the reach."""
        kept = tokens if self.reach is None else min(tokens, self.reach + behind)
        return kept * self.token_bytes + self.state_bytes


def layer_kinds(config: Mapping[str, Any]) -> list[LayerKind]:
    """The kinds of a model by its configuration.

    Raises RefusedLayersError for one with caches that an engine refuses, UnknownLayersError for one
    that lacks something, is damaged, or has layers of a kind that is not known.
    """
    try:
        text = config.get("text_config", config)
        # As vLLM tells these models: the field is there, whatever it says.
        if "index_topk" in text:
            raise RefusedLayersError(
                "index_topk: caches of sparse attention are refused, KVTC does not read them"
            )
        counts = Counter(_layer_types(text))
        kinds = [_kind(text, name, layers) for name, layers in counts.items()]
    except (RefusedLayersError, UnknownLayersError):
        raise
    except Exception as error:  # a file from anywhere: any field may hold anything
        problem = f"{type(error).__name__}: {error}"
        raise UnknownLayersError(f"config.json can't be understood ({problem})") from error
    if any(kind.layers < 1 or kind.token_bytes < 0 or kind.state_bytes < 0 for kind in kinds):
        raise UnknownLayersError("config.json has sizes below 0")
    if not any(kind.token_bytes or kind.state_bytes for kind in kinds):
        raise UnknownLayersError("config.json has no layer that keeps anything")
    return sorted(kinds, key=lambda kind: (kind.kind == "state", kind.reach is not None))


def expected_ratio(
    kinds: Sequence[LayerKind], tokens: int, ratio: float, behind: int = 256
) -> float:
    """Uncompressed over stored bytes of a prefix with one boundary, before entropy coding.

    ratio: of what is coded, latents at most by `LATENT_RATIO`. behind: the recent window and a
    chunk, kept besides what is needed.
    """
    sizes = [(kind, kind.prefix_bytes(tokens, behind)) for kind in kinds]
    stored = sum(size / kind.coded_by(ratio) for kind, size in sizes)
    return sum(size for _, size in sizes) / stored


def _layer_types(text: Mapping[str, Any]) -> list[str]:
    """One name per layer that keeps anything; a layer with attention and a state has both."""
    named = text.get("layer_types") or text.get("layers_block_type")
    if named:
        kept = [str(name) for name in named if name not in ("mlp", "moe")]
        both = ["mamba"] * len(kept) if text.get("model_type") == "falcon_h1" else []
        shared = int(text.get("num_kv_shared_layers") or 0)
        return kept[: len(kept) - shared] + both
    if pattern := text.get("hybrid_override_pattern"):
        return [_LETTERS[letter] for letter in str(pattern) if letter in _LETTERS]
    layers = int(_number(text, "num_hidden_layers"))
    family = str(text.get("model_type")).removesuffix("_text")
    if family == "falcon_h1":
        return ["full_attention", "mamba"] * layers
    if text.get("no_rope_layers"):
        return [
            "chunked_attention" if rope else "full_attention" for rope in text["no_rope_layers"]
        ]
    if family in _PERIODS:
        name, field, period = _PERIODS[family]
        period = int(text.get(field) or period)
        return ["full_attention" if i % period == 0 else name for i in range(1, layers + 1)]
    if text.get("sliding_window") and text.get("use_sliding_window", True):
        return ["sliding_attention"] * layers
    return ["full_attention"] * layers


def _kind(text: Mapping[str, Any], name: str, layers: int) -> LayerKind:
    if name in _RECURRENT:
        return LayerKind("state", layers, state_bytes=layers * _state_bytes(text))
    if text.get("kv_lora_rank"):
        width = int(text["kv_lora_rank"]) + int(_number(text, "qk_rope_head_dim"))
        return LayerKind("latent", layers, layers * width * ELEMENT_BYTES)
    heads = int(text.get("num_key_value_heads") or _number(text, "num_attention_heads"))
    size = text.get("head_dim")
    if size is None:
        size = int(_number(text, "hidden_size")) // int(_number(text, "num_attention_heads"))
    if name in ("full_attention", "attention"):
        # Gemma 4's layers of full attention have other heads.
        size = text.get("global_head_dim") or size
        heads = text.get("num_global_key_value_heads") or heads
    token_bytes = layers * heads * int(size) * 2 * ELEMENT_BYTES
    if name in _WINDOWS:
        window = int(_number(text, "sliding_window"))
        return LayerKind(f"window {window}", layers, token_bytes, window - 1)
    if name == "chunked_attention":
        chunk = int(_number(text, "attention_chunk_size"))
        return LayerKind(f"local {chunk}", layers, token_bytes, chunk - 1)
    if name in ("full_attention", "attention"):
        return LayerKind("full", layers, token_bytes)
    raise UnknownLayersError(f"layer type {name!r} is not known")


def _state_bytes(text: Mapping[str, Any]) -> int:
    """Of one recurrent layer: what its convolution and its recurrence keep."""
    if "linear_num_value_heads" in text:
        keys = int(text["linear_num_key_heads"]) * int(text["linear_key_head_dim"])
        values = int(text["linear_num_value_heads"]) * int(text["linear_value_head_dim"])
        convolved = (2 * keys + values) * (int(text["linear_conv_kernel_dim"]) - 1)
        recurrent = values * int(text["linear_key_head_dim"])
    elif "conv_L_cache" in text:
        convolved = int(_number(text, "hidden_size")) * (int(text["conv_L_cache"]) - 1)
        recurrent = 0
    else:
        heads = int(_number(text, "mamba_n_heads", "mamba_num_heads"))
        inner = heads * int(_number(text, "mamba_d_head", "mamba_head_dim"))
        state = int(_number(text, "mamba_d_state", "ssm_state_size"))
        groups = int(_number(text, "mamba_n_groups", "n_groups"))
        kernel = int(_number(text, "mamba_d_conv", "conv_kernel"))
        convolved = (inner + 2 * groups * state) * (kernel - 1)
        recurrent = inner * state
    wide = text.get("mamba_ssm_dtype", text.get("mamba_ssm_cache_dtype")) == "float32"
    return math.ceil(convolved * ELEMENT_BYTES + recurrent * (4 if wide else ELEMENT_BYTES))


def _number(text: Mapping[str, Any], *names: str) -> float:
    for name in names:
        if isinstance(text.get(name), int | float):
            return float(text[name])
    raise UnknownLayersError(f"config.json has no {' or '.join(names)}")
