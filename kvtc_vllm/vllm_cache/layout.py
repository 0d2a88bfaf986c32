"""Paged KV tensors <-> chunk tensors.

Since 0.26 vLLM registers one tensor a layer with the logical shape
[blocks, heads, tokens, K|V], whatever its strides. On GPU the last dimension
holds K then V. The CPU backend keeps the shape but orders each head's page by
its own kernels' needs (K transposed, say), so that order is learnt at start-up
by writing an index pattern through vLLM's own operator and reading it back.

An fp8 cache is registered as uint8. Its elements are moved as bytes, which
every tensor operation can do on every device, and are fp8 outside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtc_vllm.codec.kernels.paged import PagedCache
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup
from kvtc_vllm.vllm_cache.cache_dtype import is_fp8, movable
from kvtc_vllm.vllm_cache.compat import UnsupportedError
from kvtc_vllm.vllm_cache.cpu_pages import cpu_page_order
from kvtc_vllm.vllm_cache.page_order import LatentOrder, PackedOrder, PageOrder


class PagedLayout:
    """Reads and writes chunks in one group of the paged cache of one rank.

    caches: layer name -> registered tensor, of this group. Gathering runs on the calling
    thread and, on GPU, on its current stream. Lists of blocks are as many of each block table of
    the group, table by table, first to last of the prefix.
    """

    def __init__(self, caches: dict[str, torch.Tensor], group: CacheGroup) -> None:
        missing = [name for name in group.layer_names if name not in caches]
        extra = [name for name in caches if name not in group.layer_names]
        if missing or extra:
            raise UnsupportedError(
                f"registered KV caches do not match the cache group: missing {missing[:3]}, "
                f"unexpected {extra[:3]}"
            )
        self._group = group
        self.tensors = tuple(_elements(caches[name], group) for name in group.layer_names)
        """Registered tensors in model order, of the cache dtype."""
        width = group.head_size + group.head_size_v
        for name, tensor in zip(group.layer_names, self.tensors, strict=True):
            if (
                tensor.dim() != 4
                or tensor.shape[1] != group.num_kv_heads
                or tensor.shape[3] != width
                or group.block_size % tensor.shape[2]
                or tensor.dtype != group.dtype
            ):
                raise UnsupportedError(
                    f"layer {name}: KV cache {tuple(tensor.shape)} {tensor.dtype} is not "
                    f"[blocks, {group.num_kv_heads}, tokens, {width}] {group.dtype}"
                )
        self._tensors = [movable(tensor) for tensor in self.tensors]
        self.tables = len(group.tables)
        """Block tables of the group."""
        # Of each layer, counted within the group.
        self._table = [group.tables.index(table) for table in group.layer_table]
        self._table = self._table or [0] * len(self.tensors)
        first = self._tensors[0]
        # A backend may split one scheduler block into several kernel blocks.
        self._kernel_tokens = int(first.shape[2])
        self._split = group.block_size // self._kernel_tokens
        self._order: PageOrder
        if group.latent:
            self._order = LatentOrder(group.head_size_v)
        elif first.device.type == "cpu":
            self._order = cpu_page_order(self._kernel_tokens, group)
        else:
            self._order = PackedOrder(group.head_size)

    @property
    def device(self) -> torch.device:
        """Where the paged cache lives."""
        return self._tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the paged cache."""
        return self._group.dtype

    @property
    def block_size(self) -> int:
        """Tokens a scheduler block."""
        return self._group.block_size

    def staged_bytes(self, blocks: int) -> int:
        """Bytes of so many blocks, of all tables together."""
        return blocks * self._group.block_size * self._group.token_bytes // self.tables

    def sides(self) -> PagedCache:
        """The cache as kernels address it. Raises UnsupportedError if they can't."""
        return self._order.sides(self.tensors)

    def gather(self, block_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy blocks out: K [T, L, H, D] and V [T, L, H, Dv], T = blocks a table * block_size."""
        return self.unpack(self.copy(block_ids))

    def copy(self, block_ids: Sequence[int]) -> torch.Tensor:
        """Blocks as they are: [L, pages, H, tokens, D + Dv]. Far cheaper than `unpack`.

        Only `unpack` knows the element type.
        """
        pages = self._pages(block_ids)
        first = self._tensors[0]
        copied = first.new_empty((len(self._tensors), len(pages[0]), *first.shape[1:]))
        for tensor, table, out in zip(self._tensors, self._table, copied, strict=True):
            torch.index_select(tensor, 0, pages[table], out=out)
        return copied

    def unpack(self, copied: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K [T, L, H, D] and V [T, L, H, Dv] of what `copy` returned; on any thread."""
        group = self._group
        layers, pages, heads, tokens = copied.shape[:4]
        k = copied.new_empty((pages, tokens, layers, heads, group.head_size))
        v = copied.new_empty((pages, tokens, layers, heads, group.head_size_v))
        for layer, source in enumerate(copied):
            # A layer's pages stay in the processor's cache between the two copies.
            keys, values = self._order.split(source)
            k[:, :, layer] = keys.transpose(1, 2)
            v[:, :, layer] = values.transpose(1, 2)
        return k.flatten(0, 1).view(group.dtype), v.flatten(0, 1).view(group.dtype)

    def scatter(
        self, block_ids: Sequence[int], k: torch.Tensor, v: torch.Tensor, first_layer: int = 0
    ) -> None:
        """Write K [T, l, H, D] and V [T, l, H, Dv] of layers first_layer.. into blocks."""
        pages = self._pages(block_ids)
        k, v = movable(k.to(self.device)), movable(v.to(self.device))
        for i in range(k.shape[1]):
            layer = first_layer + i
            self._tensors[layer][pages[self._table[layer]]] = self._order.join(
                self._paged(k[:, i]), self._paged(v[:, i])
            )

    def zero(self, block_ids: Sequence[int]) -> None:
        """Clear blocks."""
        pages = self._pages(block_ids)
        for tensor, table in zip(self._tensors, self._table, strict=True):
            tensor[pages[table]] = 0

    def _paged(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H, D] -> [pages, H, tokens, D]."""
        return x.unflatten(0, (-1, self._kernel_tokens)).transpose(1, 2)

    def _pages(self, block_ids: Sequence[int]) -> torch.Tensor:
        """By block table, pages of the kernels: [tables, pages]."""
        ids = torch.tensor(list(block_ids), dtype=torch.long)
        if self.device.type != "cpu":
            # From pageable memory the copy would wait for the whole step before it.
            ids = ids.pin_memory().to(self.device, non_blocking=True)
        ids = ids.view(self.tables, -1)
        if self._split == 1:
            return ids
        offsets = torch.arange(self._split, device=self.device)
        return (ids[..., None] * self._split + offsets).flatten(1)


def paged_layouts(
    caches: dict[str, torch.Tensor], geometry: CacheGeometry
) -> tuple[PagedLayout, ...]:
    """Layouts of all cache groups of attention.

    caches: layer name -> registered tensor. Layers that read another layer's KV are registered
    with its tensor and belong to no group. Raises UnsupportedError for other layers of no group.
    """
    names = [name for group in geometry.groups for name in group.layer_names]
    known = {caches[name].data_ptr() for name in names if name in caches}
    strangers = [name for name in caches if name not in names]
    foreign = [name for name in strangers if caches[name].data_ptr() not in known]
    if foreign:
        raise UnsupportedError(
            f"registered KV caches do not match the cache groups: unexpected {foreign[:3]}"
        )
    return tuple(
        PagedLayout({n: caches[n] for n in group.layer_names if n in caches}, group)
        for group in geometry.coded_groups
    )


def _elements(tensor: torch.Tensor, group: CacheGroup) -> torch.Tensor:
    """A registered tensor as the elements that it holds: [blocks, H, tokens, D + Dv]."""
    if group.latent and tensor.dim() == 3:  # some releases leave out the only head
        tensor = tensor.unsqueeze(1)
    fp8 = tensor.dtype == torch.uint8 and is_fp8(group.dtype)
    return tensor.view(group.dtype) if fp8 else tensor
