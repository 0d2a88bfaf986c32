"""The order in which vLLM's CPU backend keeps a head's page, learnt at start-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvtc_vllm.codec.kernels.paged import PagedCache, PagedTensor
from kvtc_vllm.offload.geometry import CacheGroup
from kvtc_vllm.vllm_cache.cache_dtype import is_fp8, movable
from kvtc_vllm.vllm_cache.compat import UnsupportedError

_Loops = tuple[tuple[int, int], ...]
"""(count, stride), outermost first."""


class PermutedOrder:
    """A head's page is K in one order of its elements, then V in another.

    k_source[f] = token * head_size + dim of the element at place f of the K half.
    """

    def __init__(self, tokens: int, head_size: int, k_source: torch.Tensor, v_source: torch.Tensor):
        half = tokens * head_size
        shape = (tokens, head_size)
        self._halves: tuple[_Half, ...] = tuple(
            _Half.of(source, shape, first) for source, first in ((k_source, 0), (v_source, half))
        )
        self._page = (tokens, 2 * head_size)

    def split(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (half.read(pages) for half in self._halves)
        return k, v

    def join(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        pages = k.new_empty((*k.shape[:2], *self._page))
        for half, x in zip(self._halves, (k, v), strict=True):
            half.write(pages, x)
        return pages

    def sides(self, tensors: Sequence[torch.Tensor]) -> PagedCache:
        k, v = (PagedTensor.of([half.plain(x) for x in tensors]) for half in self._halves)
        return PagedCache(k, v)


@dataclass(frozen=True)
class _Half:
    """Where a head's page has its elements [N, D] of K, or of V.

    places: [N, D], element's place in the half that begins at `first`. tokens, dims: (count,
    stride) of the loops that give it, outermost first, of one or two levels each: backends for
    matrix units pack pairs of elements. None if no such loops do: then elements are moved one by
    one through a table, which takes several times as long (`benchmarks.cpu_pages`).
    """

    places: torch.Tensor
    first: int
    tokens: _Loops | None
    dims: _Loops | None

    @classmethod
    def of(cls, source: torch.Tensor, shape: tuple[int, int], first: int) -> _Half:
        """source[f]: number (in `shape`) of the element at place f."""
        places = torch.argsort(source).view(shape)
        tokens, dims = _loops(places[:, 0] - places[0, 0]), _loops(places[0] - places[0, 0])
        if tokens is None or dims is None or int(places[0, 0]):
            return cls(places, first, None, None)
        sums = _offsets(tokens)[:, None] + _offsets(dims)
        known = torch.equal(places, sums)
        return cls(places, first, tokens if known else None, dims if known else None)

    def read(self, pages: torch.Tensor) -> torch.Tensor:
        """[n, H, N, D]: a view where the elements of each token lie side by side, else a copy."""
        if self.tokens is None or self.dims is None or not _whole(pages):
            return pages.flatten(2).index_select(2, self._numbers).unflatten(2, self.places.shape)
        shape = *pages.shape[:2], *self.places.shape
        found = self._view(pages, self.tokens, self.dims).reshape(shape)
        # Whoever moves rows reads them where they are. Columns are turned here, page by page.
        return found if found.stride(-1) == 1 else found.contiguous()

    def write(self, pages: torch.Tensor, x: torch.Tensor) -> None:
        """Into contiguous pages, x [n, H, N, D]."""
        if self.tokens is None or self.dims is None:
            pages.flatten(2).index_copy_(2, self._numbers, x.flatten(2))
            return
        shape = [count for count, _ in (*self.tokens, *self.dims)]
        self._view(pages, self.tokens, self.dims).copy_(x.reshape(*x.shape[:2], *shape))

    def plain(self, pages: torch.Tensor) -> torch.Tensor:
        """A view [n, H, N, D]. Raises UnsupportedError if one stride each does not give it."""
        tokens, dims = self.tokens, self.dims
        if tokens is None or dims is None or len(tokens) + len(dims) > 2 or not _whole(pages):
            raise UnsupportedError("the CPU backend's page order has no strides")
        return self._view(pages, tokens, dims)

    @cached_property
    def _numbers(self) -> torch.Tensor:
        """Places in the whole page, token by token: read for every layer of a chunk."""
        return self.places.flatten() + self.first

    def _view(self, pages: torch.Tensor, tokens: _Loops, dims: _Loops) -> torch.Tensor:
        counts, strides = zip(*tokens, *dims, strict=True)
        return pages.as_strided(
            (*pages.shape[:2], *counts),
            (*pages.stride()[:2], *strides),
            pages.storage_offset() + self.first,
        )


def _loops(offsets: torch.Tensor) -> _Loops | None:
    """Loops of one or two levels that count like `offsets`, of which the first is 0."""
    if len(offsets) == 1:
        return ((1, 1),)
    inner = torch.arange(len(offsets)) * offsets[1]
    equal = (offsets == inner).to(torch.uint8)
    count = int(equal.argmin()) or len(offsets)
    if count == len(offsets):
        return ((count, int(offsets[1])),)
    if len(offsets) % count:
        return None
    loops = ((len(offsets) // count, int(offsets[count])), (count, int(offsets[1])))
    return loops if torch.equal(_offsets(loops), offsets) else None


def _offsets(loops: _Loops) -> torch.Tensor:
    total = torch.zeros(1, dtype=torch.long)
    for count, stride in loops:
        total = (total[:, None] + torch.arange(count) * stride).flatten()
    return total


def _whole(pages: torch.Tensor) -> bool:
    """Whether each head's page lies in one piece."""
    return pages[0, 0].is_contiguous() if len(pages) else True


def cpu_page_order(tokens: int, group: CacheGroup) -> PermutedOrder:
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
    return PermutedOrder(tokens, size, halves[0], halves[1])


def _written_by_cpu(values: torch.Tensor, tokens: int, group: CacheGroup) -> torch.Tensor:
    """One head's page after vLLM's operator wrote `values` [tokens * D] as K and as V.

    Returns [2, tokens * D] of the cache dtype, in the order of memory.
    """
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    size, dtype = group.head_size, group.dtype
    page = movable(torch.zeros(2, 1, tokens, 2 * size, dtype=dtype))
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
