"""Rows -> paged cache: add the mean, apply RoPE, unscale, round to the cache dtype, write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvtc_vllm.codec.kernels.jit import EXACT, jit
from kvtc_vllm.codec.kernels.numeric import narrow, storage, storage_type, widen
from kvtc_vllm.codec.kernels.paged import PagedSide
from kvtc_vllm.codec.kernels.rotation import Rotation

SKIP = -1
"""Slot of a row that is not wanted: nothing is written."""


def scatter_rows(
    side: PagedSide,
    slots: torch.Tensor,
    positions: torch.Tensor,
    rotations: Sequence[Rotation],
    mean: torch.Tensor | None,
    rows: torch.Tensor,
    first_layer: int = 0,
) -> None:
    """Write R tokens of some layers of K or V.

    slots: int64 [R] on the cache's device, `SKIP` where a row is not wanted. positions: int64
    [R]. rotations: cover the layers to write, numbered from layer 0 of the model. mean: float32
    [l * H * D] or None. rows: float32 or float16 [R, l * H * D] of layers first_layer ..;
    columns contiguous. What is written equals `transform.rows_to_cache` of float32 rows + mean
    bit for bit.
    """
    if len(slots) == 0:
        return
    elements = side.layer_elements
    for run in rotations:
        table = rows if run.rope is None else storage(run.rope.cos_sin)
        first, end = run.first - first_layer, run.end - first_layer
        columns = slice(first * elements, end * elements)
        _scatter_kernel[(len(slots), end - first)](
            side.pointers[run.first :],
            *side.strides,
            slots,
            positions,
            table,
            rows if mean is None else mean[columns],
            rows[:, columns],
            rows.stride(0),
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
    if slot >= 0:
        page = tl.load(pointers + layer).to(tl.pointer_type(TYPE)) + (
            slot // page_tokens * page_stride + slot % page_tokens * token_stride
        )
        head = tl.arange(0, HEAD_TILE)[:, None]
        target = page + head.to(tl.int64) * head_stride
        column = layer * (HEADS * HEAD_SIZE) + head * HEAD_SIZE
        source = rows + row * row_stride
        if HALF > 0:
            pair = tl.arange(0, PAIR_TILE)[None, :]
            inside = (head < HEADS) & (pair < HALF)
            first = pair if NEOX else 2 * pair
            second = first + (HALF if NEOX else 1)
            x1 = tl.load(source + column + first, mask=inside, other=0.0).to(tl.float32)
            x2 = tl.load(source + column + second, mask=inside, other=0.0).to(tl.float32)
            if HAS_MEAN:
                x1 += tl.load(mean + column + first, mask=inside, other=0.0)
                x2 += tl.load(mean + column + second, mask=inside, other=0.0)
            angle = cos_sin + tl.load(positions + row) * (2 * HALF) + pair
            cos = widen(tl.load(angle, mask=pair < HALF, other=0))
            sin = widen(tl.load(angle + HALF, mask=pair < HALF, other=0))
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
            if HAS_MEAN:
                x += tl.load(mean + column + rest, mask=inside, other=0.0)
            if HAS_SCALE:
                x = tl.div_rn(x, tl.load(scales + layer) + tl.full(x.shape, 0.0, tl.float32))
            tl.store(target + rest * dim_stride, narrow(x, TYPE), mask=inside)
