"""What the tier knows of the engine's KV cache: its groups of layers, their shapes, its ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.config import ConfigError, KVTCConfig


@dataclass(frozen=True)
class CacheGroup:
    """Layers of one rank whose KV lies in the same blocks: one of vLLM's KV cache groups."""

    layer_names: tuple[str, ...]
    """Attention layers in model order."""
    block_size: int
    """Tokens per block."""
    num_kv_heads: int
    """On one rank."""
    head_size: int
    """Of keys, in elements."""
    head_size_v: int
    """Of values, in elements."""
    dtype: torch.dtype
    """Element type of the paged cache."""
    model_dtype: torch.dtype | None = None
    """Of the keys and values that the engine writes into it; None: the cache's own."""

    @property
    def token_bytes(self) -> int:
        """Uncompressed KV bytes of one token on one rank."""
        elements = self.num_kv_heads * (self.head_size + self.head_size_v)
        return len(self.layer_names) * elements * self.dtype.itemsize


@dataclass(frozen=True)
class CacheGeometry:
    """KV cache of one rank, as both sides of the connector see it."""

    groups: tuple[CacheGroup, ...]
    tp_size: int

    @property
    def token_bytes(self) -> int:
        """Uncompressed KV bytes of one token on one rank, over all groups."""
        return sum(group.token_bytes for group in self.groups)

    @property
    def only_group(self) -> CacheGroup:
        """The group, where there is just one. Raises ValueError if there are more."""
        (group,) = self.groups
        return group


def codec_geometry(
    group: CacheGroup, layer_groups: tuple[tuple[int, int], ...] | None = None
) -> Geometry:
    """The codec's view of a group. layer_groups: one of all layers if not told."""
    layers = len(group.layer_names)
    return Geometry(
        num_layers=layers,
        num_kv_heads=group.num_kv_heads,
        head_size=group.head_size,
        head_size_v=group.head_size_v,
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


def blocks_per_chunk(config: KVTCConfig, group: CacheGroup) -> int:
    """Blocks per chunk. Raises ConfigError if chunks aren't whole blocks."""
    if config.chunk_tokens % group.block_size:
        raise ConfigError(
            f"chunk_tokens={config.chunk_tokens} must be a multiple of vLLM's block size, "
            f"{group.block_size}"
        )
    return config.chunk_tokens // group.block_size
