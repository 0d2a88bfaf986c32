"""Paged cache -> rows: read slots of any strides, scale, undo RoPE, subtract the mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvtc_vllm.codec.kernels.jit import EXACT, jit
from kvtc_vllm.codec.kernels.numeric import storage, storage_type, widen
from kvtc_vllm.codec.kernels.paged import PagedSide
from kvtc_vllm.codec.kernels.rotation import Rotation


def gather_rows(
    side: PagedSide,
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
    if len(slots) == 0:
        return
    elements = side.layer_elements
    for run in rotations:
        table = out if run.rope is None else storage(run.rope.cos_sin)
        columns = slice(run.first * elements, run.end * elements)
        _gather_kernel[(len(slots), run.end - run.first)](
            side.pointers[run.first :],
            *side.strides,
            slots,
            positions,
            table,
            out if mean is None else mean[columns],
            out[:, columns],
            out.stride(0),
            side.pointers if side.scales is None else side.scales[run.first :],
            side.page_tokens,
            TYPE=storage_type(side.dtype),
            HEADS=side.num_heads,
            HEAD_SIZE=side.head_size,
            HALF=run.half,
            NEOX=run.rope is None or run.rope.neox,
            HAS_MEAN=mean is not None,
            HAS_SCALE=side.scales is not None,
            HEAD_TILE=triton.next_power_of_2(side.num_heads),
            PAIR_TILE=triton.next_power_of_2(max(run.half, 1)),
            REST_TILE=triton.next_power_of_2(max(side.head_size - 2 * run.half, 1)),
            **EXACT,
        )


@jit(do_not_specialize=("page_tokens",))
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
    TYPE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    NEOX: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAIR_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
):
    """One program: one row of one layer."""
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1)
    slot = tl.load(slots + row)
    page = tl.load(pointers + layer).to(tl.pointer_type(TYPE)) + (
        slot // page_tokens * page_stride + slot % page_tokens * token_stride
    )
    head = tl.arange(0, HEAD_TILE)[:, None]
    source = page + head.to(tl.int64) * head_stride
    column = layer * (HEADS * HEAD_SIZE) + head * HEAD_SIZE
    target = rows + row * row_stride
    if HALF > 0:
        pair = tl.arange(0, PAIR_TILE)[None, :]
        inside = (head < HEADS) & (pair < HALF)
        first = pair if NEOX else 2 * pair
        second = first + (HALF if NEOX else 1)
        y1 = widen(tl.load(source + first * dim_stride, mask=inside, other=0))
        y2 = widen(tl.load(source + second * dim_stride, mask=inside, other=0))
        if HAS_SCALE:
            y1 *= tl.load(scales + layer)
            y2 *= tl.load(scales + layer)
        angle = cos_sin + tl.load(positions + row) * (2 * HALF) + pair
        cos = widen(tl.load(angle, mask=pair < HALF, other=0))
        sin = widen(tl.load(angle + HALF, mask=pair < HALF, other=0))
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
