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
from typing import Protocol

import torch

from kvtc_vllm.codec.kernels.paged import PagedCache, PagedTensor
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup
from kvtc_vllm.vllm_cache.cache_dtype import is_fp8
from kvtc_vllm.vllm_cache.compat import UnsupportedError


class _PageOrder(Protocol):
    """Converts pages [n, H, N, D + Dv] to and from K [n, H, N, D], V [n, H, N, Dv]."""

    def split(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def join(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor: ...

    def sides(self, tensors: Sequence[torch.Tensor]) -> PagedCache:
        """Views of K and V. Raises UnsupportedError if strides can't express the order."""
        ...


class _PackedOrder:
    """K in the first head_size elements of the last dimension, V in the rest."""

    def __init__(self, head_size: int) -> None:
        self._head_size = head_size

    def split(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pages[..., : self._head_size], pages[..., self._head_size :]

    def join(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat((k, v), dim=-1)

    def sides(self, tensors: Sequence[torch.Tensor]) -> PagedCache:
        return PagedCache.packed(tensors, self._head_size)


class _LatentOrder:
    """V in the first elements of the last dimension, K in the rest."""

    def __init__(self, head_size_v: int) -> None:
        self._head_size_v = head_size_v

    def split(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pages[..., self._head_size_v :], pages[..., : self._head_size_v]

    def join(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat((v, k), dim=-1)

    def sides(self, tensors: Sequence[torch.Tensor]) -> PagedCache:
        keys, values = zip(*map(self.split, tensors), strict=True)
        return PagedCache(PagedTensor.of(keys), PagedTensor.of(values))


class _PermutedOrder:
    """A head's page is K in one order of its elements, then V in another.

    k_source[f] = token * head_size + dim of the element at place f of the K half.
    """

    def __init__(self, tokens: int, head_size: int, k_source: torch.Tensor, v_source: torch.Tensor):
        self._tokens, self._head_size = tokens, head_size
        self._sources = (k_source, v_source)
        self._places = (torch.argsort(k_source), torch.argsort(v_source))

    def split(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n, heads = pages.shape[:2]
        halves = pages.reshape(n, heads, 2, self._tokens * self._head_size)
        shape = (n, heads, self._tokens, self._head_size)
        k, v = (halves[:, :, i].index_select(2, self._places[i]).view(shape) for i in (0, 1))
        return k, v

    def join(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n, heads = k.shape[:2]
        halves = [
            x.reshape(n, heads, -1).index_select(2, source)
            for x, source in zip((k, v), self._sources, strict=True)
        ]
        return torch.stack(halves, dim=2).view(n, heads, self._tokens, 2 * self._head_size)

    def sides(self, tensors: Sequence[torch.Tensor]) -> PagedCache:
        k_place, v_place = self._places
        return PagedCache(
            PagedTensor.of([self._view(x, k_place, 0) for x in tensors]),
            PagedTensor.of(
                [self._view(x, v_place, self._tokens * self._head_size) for x in tensors]
            ),
        )

    def _view(self, pages: torch.Tensor, places: torch.Tensor, first: int) -> torch.Tensor:
        """One half of every head's page as [n, H, N, D], without copying."""
        place = places.view(self._tokens, self._head_size)
        token, dim = int(place[1, 0]), int(place[0, 1])
        strides = torch.arange(self._tokens)[:, None] * token + torch.arange(self._head_size) * dim
        if not torch.equal(place, strides) or not pages[0, 0].is_contiguous():
            raise UnsupportedError("the CPU backend's page order has no strides")
        n, heads = pages.shape[:2]
        return pages.as_strided(
            (n, heads, self._tokens, self._head_size),
            (*pages.stride()[:2], token, dim),
            pages.storage_offset() + first,
        )


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
        self._tensors = [_movable(tensor) for tensor in self.tensors]
        self.tables = len(group.tables)
        """Block tables of the group."""
        # Of each layer, counted within the group.
        self._table = [group.tables.index(table) for table in group.layer_table]
        self._table = self._table or [0] * len(self.tensors)
        first = self._tensors[0]
        # A backend may split one scheduler block into several kernel blocks.
        self._kernel_tokens = int(first.shape[2])
        self._split = group.block_size // self._kernel_tokens
        self._order: _PageOrder
        if group.latent:
            self._order = _LatentOrder(group.head_size_v)
        elif first.device.type == "cpu":
            self._order = _cpu_page_order(self._kernel_tokens, group)
        else:
            self._order = _PackedOrder(group.head_size)

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
        keys, values = [], []
        for pages in copied:
            k, v = self._order.split(pages)
            keys.append(k.transpose(1, 2).flatten(0, 1))
            values.append(v.transpose(1, 2).flatten(0, 1))
        dtype = self._group.dtype
        return torch.stack(keys, dim=1).view(dtype), torch.stack(values, dim=1).view(dtype)

    def scatter(
        self, block_ids: Sequence[int], k: torch.Tensor, v: torch.Tensor, first_layer: int = 0
    ) -> None:
        """Write K [T, l, H, D] and V [T, l, H, Dv] of layers first_layer.. into blocks."""
        pages = self._pages(block_ids)
        k, v = _movable(k.to(self.device)), _movable(v.to(self.device))
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


def _movable(x: torch.Tensor) -> torch.Tensor:
    """fp8 as bytes: few operations take it on every device."""
    return x.view(torch.uint8) if is_fp8(x.dtype) else x


def _cpu_page_order(tokens: int, group: CacheGroup) -> _PermutedOrder:
    """Learn the CPU backend's order of one head's page.

    Element (token, dim) carries the integer token * head_size + dim, so reading
    integers back gives the order. Where the operator only copies elements, they
    carry its bits. Into an fp8 cache it converts them, and they carry one octal
    digit after the other: both fp8 types hold 0 to 7 exactly.
    """
    size, dtype = group.head_size, group.dtype
    if group.head_size_v != size:
        raise UnsupportedError(
            f"head_size_v={group.head_size_v} differs from head_size={size} on the CPU backend"
        )
    everything = torch.arange(tokens * size)
    if is_fp8(dtype):
        halves = torch.zeros(2, tokens * size, dtype=torch.long)
        for shift in range(0, len(everything).bit_length(), 3):
            digits = (everything >> shift & 7).to(group.model_dtype or torch.float32)
            halves += _written_by_cpu(digits, tokens, group).float().long() << shift
    else:
        if dtype.itemsize == 2 and tokens * size > 1 << 15:
            raise UnsupportedError(
                f"a page of {tokens} tokens x {size} is too large to probe; use a smaller block "
                "size"
            )
        as_int = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        pattern = everything.to(as_int).view(dtype)
        halves = _written_by_cpu(pattern, tokens, group).view(as_int).long()
    for half in halves:
        if not torch.equal(half.sort().values, everything):
            raise UnsupportedError("the CPU backend's page order is not a permutation")
    return _PermutedOrder(tokens, size, halves[0], halves[1])


def _written_by_cpu(values: torch.Tensor, tokens: int, group: CacheGroup) -> torch.Tensor:
    """One head's page after vLLM's operator wrote `values` [tokens * D] as K and as V.

    Returns [2, tokens * D] of the cache dtype, in the order of memory.
    """
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    size, dtype = group.head_size, group.dtype
    page = _movable(torch.zeros(2, 1, tokens, 2 * size, dtype=dtype))
    # As `CPUAttentionBackendImpl.do_kv_cache_update` divides the registered tensor.
    k_half, v_half = page.view(2, 1, 2 * tokens, size).chunk(2, dim=2)
    pattern = values.view(tokens, 1, size)
    name: str = "auto"
    isa_options: tuple[str, ...] = ()
    if is_fp8(dtype):
        name = "fp8_e5m2" if dtype == torch.float8_e5m2 else "fp8_e4m3"
        isa_options = (name,)
    ops.cpu_attn_reshape_and_cache(
        pattern,
        pattern,
        k_half,
        v_half,
        torch.arange(tokens) + tokens,
        _get_attn_isa(values.dtype, tokens, size, *isa_options),
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype=name,
    )
    return page[1, 0].reshape(2, tokens * size).view(dtype)
