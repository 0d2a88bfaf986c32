"""Coefficients <-> packed codes of one tile, inside `payload_kernels`' kernels.

rows: where the coefficients of the tile's group begin in the chunk's first row. scales, codes:
where the group's high bytes of shifts and its packed codes begin. stream: see `load_scales`.
flag: set to 1 by unpacking a value that is not finite.
"""

from __future__ import annotations

import triton.language as tl

from kvtc_vllm.codec.kernels.jit import jit
from kvtc_vllm.codec.kernels.numeric import (
    E4M3_MAX,
    FP16_MAX,
    e4m3_decode,
    e4m3_encode,
    round_to_code,
)
from kvtc_vllm.codec.kernels.resident import COLUMNS
from kvtc_vllm.codec.quantizers.fp8 import FP8
from kvtc_vllm.codec.quantizers.uniform import INT2, INT4

BITS2 = tl.constexpr(INT2.bits)
BITS4 = tl.constexpr(INT4.bits)
BITS8 = tl.constexpr(FP8.bits)
TOP2 = tl.constexpr(float(2**INT2.bits - 1))
TOP4 = tl.constexpr(float(2**INT4.bits - 1))
_COLUMNS = tl.constexpr(COLUMNS)


@jit()
def wide_tile(  # type: ignore[no-untyped-def]
    rows,
    row_stride,
    scales,
    codes,
    flag,
    token,
    column,
    size,
    stream,
    tokens,
    BITS: tl.constexpr,
    PACK: tl.constexpr,
):
    """`_COLUMNS` columns of some tokens; shift and scale are read once per token."""
    PER_BYTE: tl.constexpr = 8 // BITS
    TOKENS: tl.constexpr = token.shape[0]
    inside = token < tokens
    shift, scale = load_scales(scales + token, inside, stream)
    place = rows + token.to(tl.int64)[:, None] * row_stride + tl.arange(0, _COLUMNS)[None, :]
    bytes_in_row = tl.arange(0, _COLUMNS // PER_BYTE)[None, :]
    packed_place = codes + (token * size + column)[:, None] // PER_BYTE + bytes_in_row
    lane = tl.arange(0, PER_BYTE)[None, None, :]
    if PACK:
        x = tl.load(place, mask=inside[:, None], other=0.0)
        divisor = tl.where(scale == 0, float("inf"), scale)
        y = tl.div_rn(x - shift[:, None], tl.broadcast_to(divisor[:, None], x.shape))
        code = _code(y, BITS)
        if BITS == BITS8:
            value = code
        else:
            split = tl.reshape(code, (TOKENS, _COLUMNS // PER_BYTE, PER_BYTE)) << (lane * BITS)
            value = tl.reduce(split, 2, tl.standard._sum_combine)
        tl.store(packed_place, value.to(tl.uint8), mask=inside[:, None])
    else:
        packed = tl.load(packed_place, mask=inside[:, None], other=0).to(tl.int32)
        wrong = ((shift - shift) != 0) | ((scale - scale) != 0)
        if BITS == BITS8:
            level = e4m3_decode(packed)
            nan = tl.where((packed & 0x7F) == 0x7F, 1, 0)
            wrong = wrong | (tl.reduce(nan, 1, tl.standard._elementwise_max) != 0)
        else:
            split = (packed[:, :, None] >> (lane * BITS)) & (2**BITS - 1)
            level = tl.reshape(split, (TOKENS, _COLUMNS)).to(tl.float32)
        wrong = wrong & inside
        tl.store(flag + token * 0, wrong.to(tl.int32), mask=wrong)
        store_coefficients(place, level * scale[:, None] + shift[:, None], inside[:, None])


@jit()
def narrow_tile(  # type: ignore[no-untyped-def]
    rows,
    row_stride,
    scales,
    codes,
    flag,
    byte,
    size,
    stream,
    tokens,
    BITS: tl.constexpr,
    PACK: tl.constexpr,
):
    """Bytes of packed codes of a group of any size; a byte may hold codes of several tokens."""
    lane = tl.arange(0, 8 // BITS)[None, :]
    element = byte[:, None] * (8 // BITS) + lane
    token = element // size
    inside = token < tokens
    used = byte * (8 // BITS) < tokens * size
    place = rows + (token.to(tl.int64) * row_stride + element % size)
    shift, scale = load_scales(scales + token, inside, stream)
    if PACK:
        x = tl.load(place, mask=inside, other=0.0)
        code = _code(tl.div_rn(x - shift, tl.where(scale == 0, float("inf"), scale)), BITS)
        packed = tl.where(inside, code, 0) << (lane * BITS)
        value = tl.reduce(packed, 1, tl.standard._sum_combine)
        tl.store(codes + byte, value.to(tl.uint8), mask=used)
    else:
        packed = tl.load(codes + byte, mask=used, other=0).to(tl.int32)
        code = (packed[:, None] >> (lane * BITS)) & (2**BITS - 1)
        level = e4m3_decode(code) if BITS == BITS8 else code.to(tl.float32)
        x = level * scale + shift
        wrong = inside & ((x - x) != 0)
        tl.store(flag + element * 0, wrong.to(tl.int32), mask=wrong)
        store_coefficients(place, x, inside)


@jit()
def _code(y, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Code of a scaled coefficient, int32."""
    if BITS == BITS8:
        code = e4m3_encode(tl.minimum(tl.maximum(y, -E4M3_MAX), E4M3_MAX))
    else:
        code = round_to_code(y, TOP2 if BITS == BITS2 else TOP4)
    return code


@jit()
def store_coefficients(place, x, mask):  # type: ignore[no-untyped-def]
    if place.dtype.element_ty == tl.float16:
        x = tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX)
    tl.store(place, x.to(place.dtype.element_ty), mask=mask)


@jit()
def load_scales(high, mask, stream):  # type: ignore[no-untyped-def]
    """Shift and scale as float32.

    high: where the high bytes of the shifts are. stream: bytes from them to those of the scales,
    from there to the low bytes of the shifts, and from there to those of the scales.
    """
    shift = _join(tl.load(high, mask=mask, other=0), tl.load(high + 2 * stream, mask=mask, other=0))
    scale = _join(
        tl.load(high + stream, mask=mask, other=0), tl.load(high + 3 * stream, mask=mask, other=0)
    )
    return shift, scale


@jit()
def _join(high, low):  # type: ignore[no-untyped-def]
    bits = (high.to(tl.int32) << 8) | low.to(tl.int32)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
