"""Made-up paged caches in every memory layout that kernels have to read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtc_vllm.codec.artifact import Kind
from kvtc_vllm.codec.kernels.paged import PagedCache, PagedTensor
from kvtc_vllm.codec.kernels.row_table import LayerPlace, RowTable
from kvtc_vllm.codec.rope import Rope

LAYOUTS = ("NHD", "HND", "apart", "interleaved layers")


def paged_cache(
    layout: str,
    layers: int,
    pages: int,
    heads: int,
    page_tokens: int,
    head_size: int,
    head_size_v: int,
    dtype: torch.dtype,
    device: str,
) -> PagedCache:
    """A cache of logical shape [pages, heads, page_tokens, D | Dv] a layer, filled with noise."""
    generator = torch.Generator().manual_seed(11)

    def noise(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 3).to(dtype).to(device)

    width = head_size + head_size_v
    if layout == "NHD":  # what vLLM 0.26 registers for its GPU backends
        stored = [noise(pages, page_tokens, heads, width).transpose(1, 2) for _ in range(layers)]
        return PagedCache.packed(stored, head_size)
    if layout == "HND":
        stored = [noise(pages, heads, page_tokens, width) for _ in range(layers)]
        return PagedCache.packed(stored, head_size)
    if layout == "interleaved layers":
        together = noise(pages, layers, heads, page_tokens, width)
        return PagedCache.packed([together[:, i] for i in range(layers)], head_size)
    keys = [noise(pages, heads, head_size, page_tokens).transpose(2, 3) for _ in range(layers)]
    values = [noise(pages, heads, page_tokens, head_size_v) for _ in range(layers)]
    return PagedCache(PagedTensor.of(keys), PagedTensor.of(values))


def read_slots(tensor: PagedTensor, slots: torch.Tensor) -> torch.Tensor:
    """[T, L, H, D] by plain indexing: what a kernel must read."""
    page, offset = slots // tensor.page_tokens, slots % tensor.page_tokens
    return torch.stack([view[page, :, offset] for view in tensor.views], dim=1)


def rows_of(
    cache: PagedCache, tensor: Kind, ropes: Sequence[Rope | None], first_layer: int = 0
) -> RowTable:
    """A row of neighbouring layers of K or V, one after the other."""
    own = cache.tensor(tensor)
    places = [
        LayerPlace(tensor, first_layer + i, rope, i * own.layer_elements)
        for i, rope in enumerate(ropes)
    ]
    return RowTable.of(cache, places, len(ropes) * own.layer_elements)
