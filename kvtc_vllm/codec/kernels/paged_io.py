"""Paged cache <-> rows: gather and scatter slots of any strides, with scales, RoPE and mean."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kvtc_vllm.codec.kernels.jit import EXACT, jit
from kvtc_vllm.codec.kernels.numeric import narrow, storage, storage_type, widen
from kvtc_vllm.codec.kernels.row_table import AlikeLayers, RowTable

_WARP_ELEMENTS = 1024
"""Elements of a token and layer that one warp works on: what is the same for all of them, such as
finding the page, is then shared by 32 elements of each thread."""
_MOST_WARPS = 4
TABLE_NUMBERS = tl.constexpr(3)
"""Of a row of `AlikeLayers.table`."""


def gather_rows(
    table: RowTable,
    slots: torch.Tensor,
    positions: torch.Tensor,
    mean: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Read R tokens of all layers of the table, K and V: one launch if they are alike.

    slots, positions: int64 [R] on the cache's device. mean: float32 [P] or None. out: float32 or
    float16 [R, P], columns contiguous; row r being the pre-RoPE row of slot r minus the mean, where
    the table has layers. In float32 it equals `transform.chunk_rows` - mean bit for bit; float16
    may overflow to infinity.
    """
    for part in table.parts:
        _launch(_gather_kernel, part, slots, positions, mean, out, None, None)


def scatter_rows(
    table: RowTable,
    slots: torch.Tensor,
    positions: torch.Tensor,
    mean: torch.Tensor | None,
    rows: torch.Tensor,
    overflowed: torch.Tensor | None = None,
    others: torch.Tensor | None = None,
) -> None:
    """Write R tokens of all layers of the table, K and V: one launch if they are alike.

    slots: int64 [R] on the cache's device, `SKIP` where a row is not wanted. positions: int64
    [R]. mean: float32 [P] or None. rows: float32 or float16 [R + n, P]; columns contiguous. What is
    written equals `transform.rows_to_cache` of float32 rows + mean bit for bit. overflowed: int32
    [R] or None; set to 1 (never to 0) where a wanted row has an element that is not finite. others:
    int64 [R] or None; i > 0 for a token whose row is row R + i - 1 instead.
    """
    for part in table.parts:
        _launch(_scatter_kernel, part, slots, positions, mean, rows, overflowed, others)


def _launch(
    kernel: Any,
    part: AlikeLayers,
    slots: torch.Tensor,
    positions: torch.Tensor,
    mean: torch.Tensor | None,
    rows: torch.Tensor,
    overflowed: torch.Tensor | None,
    others: torch.Tensor | None,
) -> None:
    """Run a kernel over every row and layer.

    For absent mean, scales, flags or other rows a kernel gets some other pointer, which it does not
    use.
    """
    if len(slots) == 0:
        return
    like = part.like
    heads = triton.next_power_of_2(like.num_heads)
    tile = heads * triton.next_power_of_2(like.head_size)
    rope = rows if part.rope is None else storage(part.rope.cos_sin)
    rest = like.head_size if part.unrotated else like.head_size - 2 * part.half
    kernel[(len(slots), len(part))](
        part.table,
        *like.strides,
        slots,
        positions,
        rope,
        rows if mean is None else mean,
        rows,
        rows.stride(0),
        slots if part.scales is None else part.scales,
        like.page_tokens,
        slots if overflowed is None else overflowed,
        slots if others is None else others,
        TYPE=storage_type(like.dtype),
        HEADS=like.num_heads,
        HEAD_SIZE=like.head_size,
        HALF=part.half,
        NEOX=part.rope is None or part.rope.neox,
        UNROTATED=part.unrotated,
        HAS_MEAN=mean is not None,
        HAS_SCALE=part.scales is not None,
        HAS_FLAGS=overflowed is not None,
        HAS_OTHERS=others is not None,
        ALIGNMENT=part.alignment,
        ROPE_ALIGNMENT=part.rope_alignment,
        COLUMN_ALIGNMENT=part.column_alignment,
        HEAD_TILE=heads,
        PAIR_TILE=triton.next_power_of_2(max(part.half, 1)),
        REST_TILE=triton.next_power_of_2(max(rest, 1)),
        num_warps=max(1, min(_MOST_WARPS, tile // _WARP_ELEMENTS)),
        **EXACT,
    )


# Triton has no parameter lists: each kernel must spell out what `_launch` passes.
@jit(do_not_specialize=("page_tokens",), any_alignment=("scales", "overflowed", "others"))
def _gather_kernel(  # type: ignore[no-untyped-def]
    table,
    page_stride,
    head_stride,
    token_stride,
    dim_stride,
    slots,
    positions,
    rope,
    mean,
    rows,
    row_stride,
    scales,
    page_tokens,
    overflowed,
    others,
    TYPE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    NEOX: tl.constexpr,
    UNROTATED: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    HAS_OTHERS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROPE_ALIGNMENT: tl.constexpr,
    COLUMN_ALIGNMENT: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAIR_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
):
    """One program: one row of one layer. Unscale, undo RoPE, subtract the mean."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1)
    slot = tl.load(slots + row)
    head = tl.arange(0, HEAD_TILE)[:, None]
    address, cos_sin, first = _layer(table, entry, COLUMN_ALIGNMENT)
    page = token_page(address, slot, page_tokens, page_stride, token_stride, TYPE, ALIGNMENT)
    source = page + head.to(tl.int64) * head_stride
    column = first + head * HEAD_SIZE
    target = rows + row * row_stride + column
    means = mean + column
    scale_at = scales + entry
    if HALF > 0:  # noqa: SIM102 - known when it is compiled, the other when it runs
        if cos_sin != 0:
            pair = tl.arange(0, PAIR_TILE)[None, :]
            inside = (head < HEADS) & (pair < HALF)
            one, two = _pair_dims(pair, HALF, NEOX)
            y1 = widen(tl.load(source + one * dim_stride, mask=inside, other=0))
            y2 = widen(tl.load(source + two * dim_stride, mask=inside, other=0))
            if HAS_SCALE:
                y1 *= tl.load(scale_at)
                y2 *= tl.load(scale_at)
            angles = _angles(cos_sin, rope, ROPE_ALIGNMENT)
            cos, sin = _angle(angles, tl.load(positions + row), pair, HALF)
            determinant = tl.where(pair < HALF, cos * cos + sin * sin, 1.0)
            x1 = tl.div_rn(y1 * cos + y2 * sin, determinant + tl.full(y1.shape, 0.0, tl.float32))
            x2 = tl.div_rn(y2 * cos - y1 * sin, determinant + tl.full(y1.shape, 0.0, tl.float32))
            if HAS_MEAN:
                x1 -= tl.load(means + one, mask=inside, other=0.0)
                x2 -= tl.load(means + two, mask=inside, other=0.0)
            tl.store(target + one, x1.to(rows.dtype.element_ty), mask=inside)
            tl.store(target + two, x2.to(rows.dtype.element_ty), mask=inside)
    if UNROTATED or 2 * HALF < HEAD_SIZE:
        begin = _unrotated_from(cos_sin, HALF, UNROTATED)
        if begin < HEAD_SIZE:
            rest = begin + tl.arange(0, REST_TILE)[None, :]
            inside = (head < HEADS) & (rest < HEAD_SIZE)
            x = widen(tl.load(source + rest * dim_stride, mask=inside, other=0))
            if HAS_SCALE:
                x *= tl.load(scale_at)
            if HAS_MEAN:
                x -= tl.load(means + rest, mask=inside, other=0.0)
            tl.store(target + rest, x.to(rows.dtype.element_ty), mask=inside)


@jit(do_not_specialize=("page_tokens",), any_alignment=("scales", "overflowed", "others"))
def _scatter_kernel(  # type: ignore[no-untyped-def]
    table,
    page_stride,
    head_stride,
    token_stride,
    dim_stride,
    slots,
    positions,
    rope,
    mean,
    rows,
    row_stride,
    scales,
    page_tokens,
    overflowed,
    others,
    TYPE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    NEOX: tl.constexpr,
    UNROTATED: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    HAS_OTHERS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROPE_ALIGNMENT: tl.constexpr,
    COLUMN_ALIGNMENT: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAIR_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
):
    """One program: one row of one layer. Add the mean, apply RoPE, scale, round to the cache."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot >= 0:
        head = tl.arange(0, HEAD_TILE)[:, None]
        address, cos_sin, first = _layer(table, entry, COLUMN_ALIGNMENT)
        page = token_page(address, slot, page_tokens, page_stride, token_stride, TYPE, ALIGNMENT)
        target = page + head.to(tl.int64) * head_stride
        place = row
        if HAS_OTHERS:
            other = tl.load(others + row)
            place = tl.where(other > 0, tl.num_programs(0) + other - 1, row)
        column = first + head * HEAD_SIZE
        source = rows + place * row_stride + column
        means = mean + column
        scale_at = scales + entry
        if HALF > 0:  # noqa: SIM102 - known when it is compiled, the other when it runs
            if cos_sin != 0:
                pair = tl.arange(0, PAIR_TILE)[None, :]
                inside = (head < HEADS) & (pair < HALF)
                one, two = _pair_dims(pair, HALF, NEOX)
                x1 = tl.load(source + one, mask=inside, other=0.0).to(tl.float32)
                x2 = tl.load(source + two, mask=inside, other=0.0).to(tl.float32)
                if HAS_FLAGS:
                    _flag(overflowed + row, tl.where(inside, tl.maximum(_bits(x1), _bits(x2)), 0))
                if HAS_MEAN:
                    x1 += tl.load(means + one, mask=inside, other=0.0)
                    x2 += tl.load(means + two, mask=inside, other=0.0)
                angles = _angles(cos_sin, rope, ROPE_ALIGNMENT)
                cos, sin = _angle(angles, tl.load(positions + row), pair, HALF)
                y1 = x1 * cos - x2 * sin
                y2 = x2 * cos + x1 * sin
                if HAS_SCALE:
                    scale = tl.load(scale_at) + tl.full(y1.shape, 0.0, tl.float32)
                    y1 = tl.div_rn(y1, scale)
                    y2 = tl.div_rn(y2, scale)
                tl.store(target + one * dim_stride, narrow(y1, TYPE), mask=inside)
                tl.store(target + two * dim_stride, narrow(y2, TYPE), mask=inside)
        if UNROTATED or 2 * HALF < HEAD_SIZE:
            begin = _unrotated_from(cos_sin, HALF, UNROTATED)
            if begin < HEAD_SIZE:
                rest = begin + tl.arange(0, REST_TILE)[None, :]
                inside = (head < HEADS) & (rest < HEAD_SIZE)
                x = tl.load(source + rest, mask=inside, other=0.0).to(tl.float32)
                if HAS_FLAGS:
                    _flag(overflowed + row, tl.where(inside, _bits(x), 0))
                if HAS_MEAN:
                    x += tl.load(means + rest, mask=inside, other=0.0)
                if HAS_SCALE:
                    x = tl.div_rn(x, tl.load(scale_at) + tl.full(x.shape, 0.0, tl.float32))
                tl.store(target + rest * dim_stride, narrow(x, TYPE), mask=inside)


@jit()
def _layer(table, entry, ALIGNMENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row of `AlikeLayers.table`."""
    row = table + entry * TABLE_NUMBERS
    column = tl.multiple_of(tl.load(row + 2).to(tl.int32), ALIGNMENT)
    return tl.load(row), tl.load(row + 1), column


@jit()
def _angles(cos_sin, like, ALIGNMENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rotary table at an address. like: another of its type."""
    return tl.multiple_of(cos_sin.to(like.dtype), ALIGNMENT)


@jit()
def _unrotated_from(cos_sin, HALF: tl.constexpr, UNROTATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first dimension of a head that is not rotated."""
    if UNROTATED and HALF > 0:
        begin = tl.where(cos_sin != 0, 2 * HALF, 0)
    else:
        begin = 2 * HALF + cos_sin.to(tl.int32) * 0
    return begin


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
    address,
    slot,
    page_tokens,
    page_stride,
    token_stride,
    TYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Where the first head of a slot's token lies in the layer at an address."""
    page = tl.multiple_of(address.to(tl.pointer_type(TYPE)), ALIGNMENT)
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
