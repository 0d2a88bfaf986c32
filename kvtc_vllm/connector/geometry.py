"""Reads what the engine's KV cache looks like, and refuses what we can't serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtc_vllm.connector.cache_dtype import cache_dtype
from kvtc_vllm.connector.compat import UnsupportedError
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def read_geometry(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> CacheGeometry:
    """Describe the cache, or raise UnsupportedError with one clear sentence."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(type(g.kv_cache_spec).__name__ for g in groups)
        raise UnsupportedError(
            f"the model has {len(groups)} KV cache groups ({kinds}); KVTC serves models whose "
            "layers all use full attention in one group"
        )
    spec = groups[0].kv_cache_spec
    if type(spec).__name__ != "FullAttentionSpec":
        raise UnsupportedError(
            f"the KV cache is a {type(spec).__name__}; KVTC serves FullAttentionSpec only"
        )
    parallel = vllm_config.parallel_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, name, 1)
        if size != 1:
            raise UnsupportedError(f"{name}={size} is not supported; use 1")
    group = CacheGroup(
        layer_names=tuple(sorted(groups[0].layer_names, key=layer_number)),
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        head_size_v=spec.head_size_v,
        dtype=cache_dtype(vllm_config, spec),
        model_dtype=vllm_config.model_config.dtype,
    )
    return CacheGeometry((group,), parallel.tensor_parallel_size)


def layer_number(name: str) -> int:
    """Index of a layer from its name: "model.layers.7.self_attn.attn" -> 7."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise UnsupportedError(f"layer name {name!r} has no number to order layers by")
    return numbers[0]
