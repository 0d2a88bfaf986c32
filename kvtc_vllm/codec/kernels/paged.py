"""The paged KV cache as kernels address it: a pointer per layer, and strides.

A *slot* is the place of one token: page * page_tokens + offset. It does not depend on the memory
layout, and a scheduler block that a backend splits into several pages has consecutive slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.artifact import Geometry, Kind

SKIP = -1
"""Slot of a token that is not wanted: nothing is written."""


@dataclass(frozen=True)
class PagedTensor:
    """K or V of all layers.

    views: one tensor per layer [pages, H, page_tokens, D], same shape, strides and dtype, any
    strides. pointers: int64 [L] on the cache's device, the address of each view. scales: float32
    [L] there: an element times its layer's scale is the model's value; None: elements are values.
    """

    views: tuple[torch.Tensor, ...]
    pointers: torch.Tensor
    scales: torch.Tensor | None = None

    @classmethod
    def of(cls, views: Sequence[torch.Tensor]) -> PagedTensor:
        """Raises ValueError if the layers are not alike."""
        first = views[0]
        for index, view in enumerate(views):
            if (view.dim(), view.shape, view.stride(), view.dtype, view.device) != (
                4,
                first.shape,
                first.stride(),
                first.dtype,
                first.device,
            ):
                raise ValueError(
                    f"layer {index} is {view.dtype} {tuple(view.shape)} with strides "
                    f"{view.stride()}, layer 0 {first.dtype} {tuple(first.shape)} with "
                    f"{first.stride()}"
                )
        pointers = torch.tensor([view.data_ptr() for view in views], dtype=torch.int64)
        return cls(tuple(views), pointers.to(first.device))

    def scaled(self, scales: torch.Tensor | None) -> PagedTensor:
        """The same memory, read and written as the model's values."""
        return replace(self, scales=None if scales is None else scales.to(self.device))

    @property
    def device(self) -> torch.device:
        return self.views[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.views[0].dtype

    @property
    def num_layers(self) -> int:
        return len(self.views)

    @property
    def num_heads(self) -> int:
        return int(self.views[0].shape[1])

    @property
    def page_tokens(self) -> int:
        return int(self.views[0].shape[2])

    @property
    def head_size(self) -> int:
        return int(self.views[0].shape[3])

    @cached_property
    def alignment(self) -> int:
        """Largest power of two, up to 16, of which all addresses are multiples, in bytes."""
        return math.gcd(16, *(view.data_ptr() for view in self.views))

    @property
    def layer_elements(self) -> int:
        """Elements of one token in one layer."""
        return self.num_heads * self.head_size

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Elements from page to page, head to head, token to token, dimension to dimension."""
        page, head, token, dim = self.views[0].stride()
        return page, head, token, dim


@dataclass(frozen=True)
class PagedCache:
    """K and V of one rank."""

    k: PagedTensor
    v: PagedTensor

    @classmethod
    def packed(cls, tensors: Sequence[torch.Tensor], head_size: int) -> PagedCache:
        """From tensors [pages, H, page_tokens, D + Dv], K first in the last dimension."""
        return cls(
            PagedTensor.of([tensor[..., :head_size] for tensor in tensors]),
            PagedTensor.of([tensor[..., head_size:] for tensor in tensors]),
        )

    def tensor(self, tensor: Kind) -> PagedTensor:
        """K or V."""
        return self.k if tensor == "k" else self.v

    def scaled(self, scales: Mapping[Kind, torch.Tensor] | None) -> PagedCache:
        """The same memory with `RankArtifact.scales`, or without any."""
        if scales is None:
            return PagedCache(self.k.scaled(None), self.v.scaled(None))
        return PagedCache(self.k.scaled(scales["k"]), self.v.scaled(scales["v"]))


def check_geometry(cache: PagedCache, geometry: Geometry) -> None:
    """Raise ValueError unless the cache is of this geometry."""
    found = (cache.k.num_layers, cache.k.num_heads, cache.k.head_size, cache.v.head_size)
    wanted = (
        geometry.num_layers,
        geometry.num_kv_heads,
        geometry.head_size,
        geometry.head_size_v,
    )
    if found != wanted:
        raise ValueError(f"the cache is {found} (layers, heads, sizes), the artifact {wanted}")


def chunk_slots(
    block_ids: Sequence[Sequence[int]],
    first_blocks: Sequence[int],
    block_size: int,
    tokens: int,
) -> npt.NDArray[np.int64]:
    """Slots of many chunks of at most `tokens` tokens, int64 [chunks, tokens] on the host.

    Of each chunk the blocks from its first_block on are wanted; other tokens have `SKIP`.
    """
    counts = np.array([len(ids) for ids in block_ids], np.int64)
    ids = np.fromiter(chain.from_iterable(block_ids), np.int64, int(counts.sum()))
    chunk = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(ids)) - np.repeat(counts.cumsum() - counts, counts)
    within += np.repeat(np.array(first_blocks, np.int64), counts)
    slots = np.full((len(counts), tokens // block_size, block_size), SKIP, np.int64)
    slots[chunk, within] = ids[:, None] * block_size + np.arange(block_size)
    return slots.reshape(len(counts), tokens)


def block_slots(block_ids: Sequence[int], block_size: int) -> torch.Tensor:
    """Slots of whole blocks in order: int64 [len(block_ids) * block_size], on the CPU."""
    ids = torch.tensor(list(block_ids), dtype=torch.int64)
    return (ids.unsqueeze(1) * block_size + torch.arange(block_size)).flatten()
