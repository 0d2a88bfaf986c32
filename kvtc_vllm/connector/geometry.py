"""What the engine's KV cache looks like, checked against what we can serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.config import ConfigError, KVTCConfig
from kvtc_vllm.connector.cache_dtype import cache_dtype
from kvtc_vllm.connector.compat import UnsupportedError


@dataclass(frozen=True)
class CacheGeometry:
    """KV cache of one rank, as both sides of the connector see it.

    layer_names: attention layers in model order. block_size: tokens a block.
    dtype: element type of the paged cache. model_dtype: of the keys and values
    that the engine writes into it, the same unless told.
    """

    layer_names: tuple[str, ...]
    block_size: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    dtype: torch.dtype
    tp_size: int
    model_dtype: torch.dtype | None = None

    @property
    def token_bytes(self) -> int:
        """Uncompressed KV bytes of one token on one rank."""
        elements = self.num_kv_heads * (self.head_size + self.head_size_v)
        return len(self.layer_names) * elements * self.dtype.itemsize


def read_geometry(vllm_config: Any, kv_cache_config: Any) -> CacheGeometry:
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
    return CacheGeometry(
        layer_names=tuple(sorted(groups[0].layer_names, key=layer_number)),
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        head_size_v=spec.head_size_v,
        dtype=cache_dtype(vllm_config, spec),
        tp_size=parallel.tensor_parallel_size,
        model_dtype=vllm_config.model_config.dtype,
    )


def layer_number(name: str) -> int:
    """Index of a layer from its name: "model.layers.7.self_attn.attn" -> 7."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise UnsupportedError(f"layer name {name!r} has no number to order layers by")
    return numbers[0]


def codec_geometry(
    geometry: CacheGeometry, layer_groups: tuple[tuple[int, int], ...] | None = None
) -> Geometry:
    """The codec's view of the cache. layer_groups: one of all layers if not told."""
    layers = len(geometry.layer_names)
    return Geometry(
        num_layers=layers,
        num_kv_heads=geometry.num_kv_heads,
        head_size=geometry.head_size,
        head_size_v=geometry.head_size_v,
        layer_groups=((0, layers),) if layer_groups is None else layer_groups,
    )


def check_budget(config: KVTCConfig, ranks: int, bound: int) -> None:
    """Raise ConfigError if the memory tier can't hold a chunk of `bound` bytes on every rank."""
    if bound > config.memory_capacity // ranks:
        raise ConfigError(
            f"memory_bytes={config.memory_bytes} is too small for one chunk: "
            f"{ranks} rank(s) need {bound * ranks} bytes for {config.chunk_tokens} "
            f"tokens; give at least {bound * ranks * 4}"
        )


def check_chunk_tokens(config: KVTCConfig, block_size: int) -> int:
    """Blocks a chunk. Raises ConfigError if chunks aren't whole blocks."""
    if config.chunk_tokens % block_size:
        raise ConfigError(
            f"chunk_tokens={config.chunk_tokens} must be a multiple of vLLM's block size, "
            f"{block_size}"
        )
    return config.chunk_tokens // block_size
