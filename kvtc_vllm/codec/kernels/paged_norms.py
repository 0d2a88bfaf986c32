"""Norms of V straight out of the paged cache: what tells attention sinks, see `sink_rule`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvtc_vllm.codec.kernels.jit import EXACT, jit
from kvtc_vllm.codec.kernels.numeric import storage_type, widen
from kvtc_vllm.codec.kernels.paged import PagedTensor
from kvtc_vllm.codec.kernels.paged_io import token_page


def squared_norms(
    tensor: PagedTensor, slots: torch.Tensor, layers: torch.Tensor, out: torch.Tensor
) -> None:
    """Sums of squares over all heads, of elements times their scales.

    slots: int64 [R]. layers: int32 [n]. out: float32 [R, n]. All on the cache's device.
    """
    if not len(slots):
        return
    _squares_kernel[(len(slots), len(layers))](
        tensor.pointers,
        *tensor.strides,
        slots,
        layers,
        out,
        tensor.pointers if tensor.scales is None else tensor.scales,
        tensor.page_tokens,
        TYPE=storage_type(tensor.dtype),
        HEADS=tensor.num_heads,
        HEAD_SIZE=tensor.head_size,
        HAS_SCALE=tensor.scales is not None,
        ALIGNMENT=tensor.alignment,
        HEAD_TILE=triton.next_power_of_2(tensor.num_heads),
        DIM_TILE=triton.next_power_of_2(tensor.head_size),
        num_warps=1,
        **EXACT,
    )


@jit(do_not_specialize=("page_tokens",), any_alignment=("pointers", "scales"))
def _squares_kernel(  # type: ignore[no-untyped-def]
    pointers,
    page_stride,
    head_stride,
    token_stride,
    dim_stride,
    slots,
    layers,
    out,
    scales,
    page_tokens,
    TYPE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    """One program: one token in one of the layers."""
    row = tl.program_id(0).to(tl.int64)
    layer = tl.load(layers + tl.program_id(1))
    slot = tl.load(slots + row)
    address = tl.load(pointers + layer)
    page = token_page(address, slot, page_tokens, page_stride, token_stride, TYPE, ALIGNMENT)
    head = tl.arange(0, HEAD_TILE)[:, None]
    dim = tl.arange(0, DIM_TILE)[None, :]
    place = page + head.to(tl.int64) * head_stride + dim * dim_stride
    x = widen(tl.load(place, mask=(head < HEADS) & (dim < HEAD_SIZE), other=0))
    if HAS_SCALE:
        x *= tl.load(scales + layer)
    sums = tl.reduce(x * x, 1, tl.standard._sum_combine)
    total = tl.reduce(sums, 0, tl.standard._sum_combine)
    tl.store(out + row * tl.num_programs(1) + tl.program_id(1), total)
