"""Paged cache <-> rows: gather and scatter slots of any strides, with scales, RoPE and mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kvtc_vllm.codec.kernels.jit import EXACT, jit
from kvtc_vllm.codec.kernels.numeric import narrow, storage, storage_type, widen
from kvtc_vllm.codec.kernels.paged import PagedTensor, Rotation

_WARP_ELEMENTS = 1024
"""Elements of a token and layer that one warp works on: what is the same for all of them, such as
finding the page, is then shared by 32 elements of each thread."""
_MOST_WARPS = 4


def gather_rows(
    tensor: PagedTensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    rotations: Sequence[Rotation],
    mean: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Read R tokens of all layers of K or V.

    slots, positions: int64 [R] on the cache's device. rotations: cover the layers; for V one
    without a rope. mean: float32 [L * H * D] or None. out: float32 or float16 [R, L * H * D],
    row r being the pre-RoPE row of slot r minus the mean. In float32 it equals
    `transform.chunk_rows` - mean bit for bit; float16 may overflow to infinity.
    """
    _launch(_gather_kernel, tensor, slots, positions, rotations, mean, out, 0, None)


def scatter_rows(
    tensor: PagedTensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    rotations: Sequence[Rotation],
    mean: torch.Tensor | None,
    rows: torch.Tensor,
    first_layer: int = 0,
    overflowed: torch.Tensor | None = None,
) -> None:
    """Write R tokens of some layers of K or V.

    slots: int64 [R] on the cache's device, `SKIP` where a row is not wanted. positions: int64
    [R]. rotations: cover the layers to write, numbered from layer 0 of the model. mean: float32
    [l * H * D] or None. rows: float32 or float16 [R, l * H * D] of layers first_layer ..;
    columns contiguous. What is written equals `transform.rows_to_cache` of float32 rows + mean
    bit for bit. overflowed: int32 [R] or None; set to 1 (never to 0) where a wanted row has an
    element that is not finite.
    """
    _launch(
        _scatter_kernel, tensor, slots, positions, rotations, mean, rows, first_layer, overflowed
    )


def _launch(
    kernel: Any,
    tensor: PagedTensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    rotations: Sequence[Rotation],
    mean: torch.Tensor | None,
    rows: torch.Tensor,
    first_layer: int,
    overflowed: torch.Tensor | None,
) -> None:
    """Run a kernel over every row and layer, one launch per span. rows: of first_layer ...

    For an absent table, mean, scales or flags a kernel gets some other pointer, which it does not
    use.
    """
    if len(slots) == 0:
        return
    elements = tensor.layer_elements
    heads = triton.next_power_of_2(tensor.num_heads)
    tile = heads * triton.next_power_of_2(tensor.head_size)
    for span in rotations:
        table = rows if span.rope is None else storage(span.rope.cos_sin)
        first, end = span.first - first_layer, span.end - first_layer
        columns = slice(first * elements, end * elements)
        kernel[(len(slots), end - first)](
            tensor.pointers[span.first :],
            *tensor.strides,
            slots,
            positions,
            table,
            rows if mean is None else mean[columns],
            rows[:, columns],
            rows.stride(0),
            tensor.pointers if tensor.scales is None else tensor.scales[span.first :],
            tensor.page_tokens,
            slots if overflowed is None else overflowed,
            TYPE=storage_type(tensor.dtype),
            HEADS=tensor.num_heads,
            HEAD_SIZE=tensor.head_size,
            HALF=span.half,
            NEOX=span.rope is None or span.rope.neox,
            HAS_MEAN=mean is not None,
            HAS_SCALE=tensor.scales is not None,
            HAS_FLAGS=overflowed is not None,
            ALIGNMENT=tensor.alignment,
            HEAD_TILE=heads,
            PAIR_TILE=triton.next_power_of_2(max(span.half, 1)),
            REST_TILE=triton.next_power_of_2(max(tensor.head_size - 2 * span.half, 1)),
            num_warps=max(1, min(_MOST_WARPS, tile // _WARP_ELEMENTS)),
            **EXACT,
        )


# Triton has no parameter lists: each kernel must spell out what `_launch` passes.
@jit(do_not_specialize=("page_tokens",), any_alignment=("pointers", "scales", "overflowed"))
def _gather_kernel(  # type: ignore[no-untyped-def]
    pointers,
    page_stride,
    head_stride,
    token_stride,
    dim_stride,
    slots,
    positions,
    cos_sin,
    mean,
    rows,
    row_stride,
    scales,
    page_tokens,
    overflowed,
    TYPE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    NEOX: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAIR_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
):
    """One program: one row of one layer. Unscale, undo RoPE, subtract the mean."""
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1)
    slot = tl.load(slots + row)
    head = tl.arange(0, HEAD_TILE)[:, None]
    column = layer * (HEADS * HEAD_SIZE) + head * HEAD_SIZE
    page = token_page(
        pointers, layer, slot, page_tokens, page_stride, token_stride, TYPE, ALIGNMENT
    )
    source = page + head.to(tl.int64) * head_stride
    target = rows + row * row_stride
    if HALF > 0:
        pair = tl.arange(0, PAIR_TILE)[None, :]
        inside = (head < HEADS) & (pair < HALF)
        first, second = _pair_dims(pair, HALF, NEOX)
        y1 = widen(tl.load(source + first * dim_stride, mask=inside, other=0))
        y2 = widen(tl.load(source + second * dim_stride, mask=inside, other=0))
        if HAS_SCALE:
            y1 *= tl.load(scales + layer)
            y2 *= tl.load(scales + layer)
        cos, sin = _angle(cos_sin, tl.load(positions + row), pair, HALF)
        determinant = tl.where(pair < HALF, cos * cos + sin * sin, 1.0)
        x1 = tl.div_rn(y1 * cos + y2 * sin, determinant + tl.full(y1.shape, 0.0, tl.float32))
        x2 = tl.div_rn(y2 * cos - y1 * sin, determinant + tl.full(y1.shape, 0.0, tl.float32))
        if HAS_MEAN:
            x1 -= tl.load(mean + column + first, mask=inside, other=0.0)
            x2 -= tl.load(mean + column + second, mask=inside, other=0.0)
        tl.store(target + column + first, x1.to(rows.dtype.element_ty), mask=inside)
        tl.store(target + column + second, x2.to(rows.dtype.element_ty), mask=inside)
    if 2 * HALF < HEAD_SIZE:
        rest = 2 * HALF + tl.arange(0, REST_TILE)[None, :]
        inside = (head < HEADS) & (rest < HEAD_SIZE)
        x = widen(tl.load(source + rest * dim_stride, mask=inside, other=0))
        if HAS_SCALE:
            x *= tl.load(scales + layer)
        if HAS_MEAN:
            x -= tl.load(mean + column + rest, mask=inside, other=0.0)
        tl.store(target + column + rest, x.to(rows.dtype.element_ty), mask=inside)


@jit(do_not_specialize=("page_tokens",), any_alignment=("pointers", "scales", "overflowed"))
def _scatter_kernel(  # type: ignore[no-untyped-def]
    pointers,
    page_stride,
    head_stride,
    token_stride,
    dim_stride,
    slots,
    positions,
    cos_sin,
    mean,
    rows,
    row_stride,
    scales,
    page_tokens,
    overflowed,
    TYPE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    NEOX: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAIR_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
):
    """One program: one row of one layer. Add the mean, apply RoPE, scale, round to the cache."""
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot >= 0:
        head = tl.arange(0, HEAD_TILE)[:, None]
        column = layer * (HEADS * HEAD_SIZE) + head * HEAD_SIZE
        page = token_page(
            pointers, layer, slot, page_tokens, page_stride, token_stride, TYPE, ALIGNMENT
        )
        target = page + head.to(tl.int64) * head_stride
        source = rows + row * row_stride
        if HALF > 0:
            pair = tl.arange(0, PAIR_TILE)[None, :]
            inside = (head < HEADS) & (pair < HALF)
            first, second = _pair_dims(pair, HALF, NEOX)
            x1 = tl.load(source + column + first, mask=inside, other=0.0).to(tl.float32)
            x2 = tl.load(source + column + second, mask=inside, other=0.0).to(tl.float32)
            if HAS_FLAGS:
                _flag(overflowed + row, tl.where(inside, tl.maximum(_bits(x1), _bits(x2)), 0))
            if HAS_MEAN:
                x1 += tl.load(mean + column + first, mask=inside, other=0.0)
                x2 += tl.load(mean + column + second, mask=inside, other=0.0)
            cos, sin = _angle(cos_sin, tl.load(positions + row), pair, HALF)
            y1 = x1 * cos - x2 * sin
            y2 = x2 * cos + x1 * sin
            if HAS_SCALE:
                scale = tl.load(scales + layer) + tl.full(y1.shape, 0.0, tl.float32)
                y1 = tl.div_rn(y1, scale)
                y2 = tl.div_rn(y2, scale)
            tl.store(target + first * dim_stride, narrow(y1, TYPE), mask=inside)
            tl.store(target + second * dim_stride, narrow(y2, TYPE), mask=inside)
        if 2 * HALF < HEAD_SIZE:
            rest = 2 * HALF + tl.arange(0, REST_TILE)[None, :]
            inside = (head < HEADS) & (rest < HEAD_SIZE)
            x = tl.load(source + column + rest, mask=inside, other=0.0).to(tl.float32)
            if HAS_FLAGS:
                _flag(overflowed + row, tl.where(inside, _bits(x), 0))
            if HAS_MEAN:
                x += tl.load(mean + column + rest, mask=inside, other=0.0)
            if HAS_SCALE:
                x = tl.div_rn(x, tl.load(scales + layer) + tl.full(x.shape, 0.0, tl.float32))
            tl.store(target + rest * dim_stride, narrow(x, TYPE), mask=inside)


@jit()
def _bits(x):  # type: ignore[no-untyped-def]
    """Of float32 without their sign: infinity and NaN are the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit()
def _flag(place, bits):  # type: ignore[no-untyped-def]
    """Set the flag if one of `_bits`, [heads, n], is of no finite number."""
    largest = tl.reduce(bits, 1, tl.standard._elementwise_max)
    tl.store(place + 0 * largest, 1, mask=largest >= 0x7F800000)


@jit()
def token_page(  # type: ignore[no-untyped-def]
    pointers,
    layer,
    slot,
    page_tokens,
    page_stride,
    token_stride,
    TYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Where the first head of a slot's token lies in a layer."""
    page = tl.multiple_of(tl.load(pointers + layer).to(tl.pointer_type(TYPE)), ALIGNMENT)
    # In 32 bits: a division of 64 is a subroutine. There are fewer slots than that.
    number = slot.to(tl.int32)
    return page + (
        (number // page_tokens).to(tl.int64) * page_stride
        + (number % page_tokens).to(tl.int64) * token_stride
    )


@jit()
def _pair_dims(pair, HALF: tl.constexpr, NEOX: tl.constexpr):  # type: ignore[no-untyped-def]
    """The two dimensions of a head that RoPE rotates together."""
    first = pair if NEOX else 2 * pair
    second = first + (HALF if NEOX else 1)
    return first, second


@jit()
def _angle(cos_sin, position, pair, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cosine and sine of a position's pairs, float32; 0 outside them."""
    place = cos_sin + position * (2 * HALF) + pair
    cos = widen(tl.load(place, mask=pair < HALF, other=0))
    sin = widen(tl.load(place + HALF, mask=pair < HALF, other=0))
    return cos, sin
