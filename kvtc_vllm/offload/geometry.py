"""What the tier knows of the engine's KV cache: its groups of layers, their shapes, its ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.config import ConfigError, KVTCConfig
from kvtc_vllm.offload.reach import FULL, FullAttention, Reach


@dataclass(frozen=True)
class CacheGroup:
    """Layers of one rank with KV of one shape and one kind of attention: stored as one record.

    vLLM may have dealt them into several of its KV cache groups, each with a block table.
    """

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
    reach: Reach = FULL
    """Which of its tokens the engine needs to go on behind a prefix."""
    layer_table: tuple[int, ...] = ()
    """For each layer the number of its block table among the engine's; empty: 0 for all."""
    state_bytes: int = 0
    """Of a recurrent layer's states at one boundary; 0 for attention. Such a group has one page per
    block, which holds the states after the block's last token, and no heads."""
    state_parts: tuple[tuple[int, torch.dtype], ...] = ()
    """Elements and type of each state in such a page, in order; together `state_bytes`."""
    latent: bool = False
    """Whether it is of multi-head latent attention: V is the latent, K the part with RoPE behind
    it, both of one head that every rank holds whole."""

    @cached_property
    def tables(self) -> tuple[int, ...]:
        """Numbers of its block tables, ascending."""
        return tuple(sorted(set(self.layer_table))) or (0,)

    @cached_property
    def kind(self) -> str:
        """What it keeps in a word, whatever the size of its window; of `stats.CACHE_KINDS`."""
        return "latent" if self.latent else str(self.reach).partition(" ")[0]

    @property
    def keeps_all(self) -> bool:
        """Whether a running request holds blocks for all of its tokens."""
        return isinstance(self.reach, FullAttention)

    def blocks(self, tables: Sequence[Sequence[int]], first: int, end: int) -> list[int]:
        """Blocks number first .. end - 1 of each of its tables, table by table.

        tables: the request's block ids by block table of the engine.
        """
        if len(self.tables) == 1:  # as for nearly every model, and long prompts have many chunks
            return list(tables[self.tables[0]][first:end])
        return [block for table in self.tables for block in tables[table][first:end]]

    def tokens(self, block_ids: Sequence[int]) -> int:
        """Tokens whose KV lies in such blocks, or that lead to the states in them."""
        return len(block_ids) // len(self.tables) * self.block_size

    def raw_bytes(self, block_ids: Sequence[int]) -> int:
        """Uncompressed bytes of such blocks, without what pads a page."""
        if self.state_bytes:
            blocks = len(block_ids) // len(self.tables)
            return blocks * self.state_bytes * len(self.layer_names)
        return self.tokens(block_ids) * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """Uncompressed KV bytes of one token on one rank; of states their share, rounded up."""
        if self.state_bytes:
            return -(-self.state_bytes * len(self.layer_names) // self.block_size)
        elements = self.num_kv_heads * (self.head_size + self.head_size_v)
        return len(self.layer_names) * elements * self.dtype.itemsize


@dataclass(frozen=True)
class CacheGeometry:
    """KV cache of one rank, as both sides of the connector see it."""

    groups: tuple[CacheGroup, ...]
    """Those that keep all tokens first."""
    tp_size: int
    hash_block: int | None = None
    """Tokens per block hash of the engine; None: the first group's block size."""
    pp_size: int = 1
    """Pipeline stages, each with layers of its own."""

    @property
    def ranks(self) -> int:
        """Workers of the engine: every stage's tensor-parallel ranks."""
        return self.tp_size * self.pp_size

    @property
    def hash_tokens(self) -> int:
        """Tokens per block hash of the engine."""
        return self.groups[0].block_size if self.hash_block is None else self.hash_block

    @property
    def boundary_tokens(self) -> int:
        """The engine goes on behind a prefix of a multiple of so many tokens only."""
        return math.lcm(*(group.block_size for group in self.groups))

    @property
    def block_tables(self) -> int:
        """Block tables per request."""
        return 1 + max(table for group in self.groups for table in group.tables)

    @property
    def keeps_all(self) -> bool:
        """Whether a running request holds blocks for all of its tokens, in one block table.

        Then vLLM can keep the part of a load before a failure.
        """
        return self.block_tables == 1 and self.groups[0].keeps_all

    @property
    def has_states(self) -> bool:
        """Whether a prefix can be restored only where states were kept."""
        return any(group.state_bytes for group in self.groups)

    @property
    def coded_groups(self) -> tuple[CacheGroup, ...]:
        """Those that a codec codes; states are kept bit for bit whatever the codec."""
        return tuple(group for group in self.groups if not group.state_bytes)

    @property
    def token_bytes(self) -> int:
        """Uncompressed KV bytes of one token on one rank, over all groups."""
        return sum(group.token_bytes for group in self.groups)

    @property
    def only_group(self) -> CacheGroup:
        """The group, where there is just one. Raises ValueError if there are more."""
        if len(self.groups) > 1:
            raise ValueError(f"the KV cache has {len(self.groups)} groups of layers, not one")
        return self.groups[0]


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


def writes_settled(config: KVTCConfig, ranks: int) -> bool:
    """Whether what is stored is written to disk only once all ranks have stored it.

    So with several ranks: if the weights of one have changed, the others know nothing of it, and
    what they computed together must not get on disk under names that are still theirs.
    """
    return config.disk_path is not None and ranks > 1


def check_budget(config: KVTCConfig, ranks: int, bound: int) -> None:
    """Raise ConfigError if the memory tier can't hold a chunk of `bound` bytes on every rank."""
    if bound > config.memory_capacity // ranks:
        raise ConfigError(
            f"memory_bytes={config.memory_bytes} is too small for one chunk: "
            f"{ranks} rank(s) need {bound * ranks} bytes for {config.chunk_tokens} "
            f"tokens; give at least {bound * ranks * 4}"
        )


def with_whole_blocks(config: KVTCConfig, geometry: CacheGeometry) -> KVTCConfig:
    """The configuration with `chunk_tokens` rounded up to whole blocks of every group."""
    multiple = geometry.boundary_tokens
    rounded = -(-config.chunk_tokens // multiple) * multiple
    return msgspec.structs.replace(config, chunk_tokens=rounded)


def check_chunks(config: KVTCConfig, geometry: CacheGeometry) -> None:
    """Raise ConfigError if chunks aren't whole blocks of every group."""
    multiple = geometry.boundary_tokens
    if config.chunk_tokens % multiple:
        sizes = sorted({group.block_size for group in geometry.groups})
        whole = f"vLLM's block size, {multiple}"
        if len(sizes) > 1:
            whole = f"{multiple}, for whole blocks of {' and of '.join(map(str, sizes))} tokens"
        raise ConfigError(f"chunk_tokens={config.chunk_tokens} must be a multiple of {whole}")
