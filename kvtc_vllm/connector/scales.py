"""Scales of an fp8 KV cache, read from the live attention layers.

vLLM stores a key or value divided by its layer's scale. Scales come from the checkpoint and are
1 where it has none; they do not change while an engine runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvtc_vllm.codec.artifact import KINDS, Kind
from kvtc_vllm.offload.geometry import CacheGroup
from kvtc_vllm.vllm_cache.cache_dtype import is_fp8
from kvtc_vllm.vllm_cache.compat import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

E5M2_BACKENDS = ("CPU_ATTN", "FLASHINFER")
"""Attention backends that write E5M2 when asked to; Triton's takes the name and writes E4M3."""


def find_scales(vllm_config: VllmConfig, group: CacheGroup) -> dict[Kind, torch.Tensor] | None:
    """Float32 [L] for K and V, on the CPU; None where all are 1 or the cache is not fp8.

    Called in a worker after the model was loaded. Raises UnsupportedError.
    """
    if not is_fp8(group.dtype):
        return None
    context = vllm_config.compilation_config.static_forward_context
    layers = [(name, context.get(name)) for name in group.layer_names]
    for name, layer in layers:
        _check_backend(name, layer, group.dtype)
    scales: dict[Kind, torch.Tensor] = {
        kind: torch.tensor([_scale(name, layer, kind) for name, layer in layers]) for kind in KINDS
    }
    if all(bool((of_kind == 1).all()) for of_kind in scales.values()):
        return None
    return scales


def joined_scales(
    of_groups: Sequence[dict[Kind, torch.Tensor] | None], groups: Sequence[CacheGroup]
) -> dict[Kind, torch.Tensor] | None:
    """What `find_scales` gave for several cache groups, as if for all of their layers."""
    if all(scales is None for scales in of_groups):
        return None
    ones = [torch.ones(len(group.layer_names)) for group in groups]
    return {
        kind: torch.cat(
            [
                one if scales is None else scales[kind]
                for scales, one in zip(of_groups, ones, strict=True)
            ]
        )
        for kind in KINDS
    }


def _scale(name: str, layer: Any, kind: Kind) -> float:
    scale = getattr(layer, f"_{kind}_scale", None)
    if scale is None:
        raise UnsupportedError(f"layer {name} has an fp8 KV cache and no _{kind}_scale")
    if scale.numel() != 1:
        raise UnsupportedError(
            f"layer {name} has {scale.numel()} fp8 scales of {kind.upper()}; KVTC reads caches "
            "with one per layer, not one per head"
        )
    value = float(scale)
    if not (math.isfinite(value) and value > 0):
        raise UnsupportedError(f"layer {name} has the fp8 scale {value} of {kind.upper()}")
    return value


def _check_backend(name: str, layer: Any, dtype: torch.dtype) -> None:
    if dtype != torch.float8_e5m2:
        return
    backend = layer.attn_backend.get_name() if layer is not None else "unknown"
    if backend not in E5M2_BACKENDS:
        raise UnsupportedError(
            f"--kv-cache-dtype fp8_e5m2 is refused with the attention backend {backend} of layer "
            f"{name}, which may write E4M3 under that name; use fp8_e4m3, or one of "
            f"{', '.join(E5M2_BACKENDS)}"
        )
