"""Coefficients <-> payloads: ranges, codes and packing, bit for bit as `payload` has them.

All groups here are coefficient groups.
"""

from __future__ import annotations

import torch
import triton.language as tl

from kvtc_vllm.codec.kernels.jit import EXACT, jit
from kvtc_vllm.codec.kernels.numeric import (
    E4M3_MAX,
    FP16_MAX,
    e4m3_decode,
    e4m3_encode,
    round_to_code,
    saturate_fp16,
)
from kvtc_vllm.codec.kernels.resident import TILE_BYTES, PlanTables
from kvtc_vllm.codec.quantizers.fp8 import FP8
from kvtc_vllm.codec.quantizers.uniform import INT2, INT4

_TOKEN_TILE = 32
_COEFFICIENT_TILE = 32

_INT2 = tl.constexpr(INT2.type_id)
_INT4 = tl.constexpr(INT4.type_id)
_FP8 = tl.constexpr(FP8.type_id)
_BITS2 = tl.constexpr(INT2.bits)
_BITS4 = tl.constexpr(INT4.bits)
_BITS8 = tl.constexpr(FP8.bits)
_TOP2 = tl.constexpr(float(2**INT2.bits - 1))
_TOP4 = tl.constexpr(float(2**INT4.bits - 1))


def encode_payloads(coefficients: torch.Tensor, tables: PlanTables, out: torch.Tensor) -> None:
    """Quantise and pack chunks of the same length.

    coefficients: float32 [chunks * tables.tokens, at least tables.rank], columns contiguous, all
    within +-65504. out: uint8 [chunks, tables.payload_bytes], contiguous; every byte is written.
    """
    chunks = len(out)
    if chunks == 0 or tables.num_groups == 0:
        return
    token_tiles = -(-tables.tokens // _TOKEN_TILE)
    _range_kernel[(tables.num_groups, token_tiles, chunks)](
        coefficients,
        coefficients.stride(0),
        out,
        tables.payload_bytes,
        tables.groups,
        tables.num_groups,
        tables.tokens,
        TOKEN_TILE=_TOKEN_TILE,
        TILE=_COEFFICIENT_TILE,
        **EXACT,
    )
    # Packing marks no chunk as damaged: any pointer will do.
    _launch_codes(coefficients, out, tables, damaged=tables.tiles, pack=True)


def decode_payloads(
    payloads: torch.Tensor, tables: PlanTables, out: torch.Tensor, damaged: torch.Tensor
) -> None:
    """Unpack chunks of the same length.

    payloads: uint8 [chunks, tables.payload_bytes], contiguous. out: float32 or float16
    [chunks * tables.tokens, tables.rank], columns contiguous; every element is written. In
    float32 it equals `payload.decode_payload` bit for bit; float16 is rounded from it and
    saturates. damaged: int32 [chunks], set to 1 (never to 0) for a chunk with a value that is
    not finite.
    """
    if tables.has_gaps:
        out.zero_()
    if len(payloads) == 0 or tables.num_groups == 0:
        return
    _launch_codes(out, payloads, tables, damaged, pack=False)


def _launch_codes(
    coefficients: torch.Tensor,
    payloads: torch.Tensor,
    tables: PlanTables,
    damaged: torch.Tensor,
    pack: bool,
) -> None:
    """Write packed codes from coefficients, or coefficients from them; scales are there."""
    _codes_kernel[(len(tables.tiles), len(payloads))](
        coefficients,
        coefficients.stride(0),
        payloads,
        tables.payload_bytes,
        tables.groups,
        tables.tiles,
        tables.num_groups,
        tables.tokens,
        damaged,
        BYTES=TILE_BYTES,
        PACK=pack,
        **EXACT,
    )


@jit(do_not_specialize=("payload_bytes", "num_groups", "tokens"))
def _range_kernel(  # type: ignore[no-untyped-def]
    coefficients,
    row_stride,
    payloads,
    payload_bytes,
    groups,
    num_groups,
    tokens,
    TOKEN_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: shifts and scales of one group for a tile of tokens of one chunk."""
    group = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(2).to(tl.int64)
    start, size, type_id, _ = _group(groups, group)
    token = tl.program_id(1) * TOKEN_TILE + tl.arange(0, TOKEN_TILE)
    rows = coefficients + (chunk * tokens + token)[:, None] * row_stride + start
    low = tl.full((TOKEN_TILE,), float("inf"), tl.float32)
    high = tl.full((TOKEN_TILE,), float("-inf"), tl.float32)
    for first in range(0, size, TILE):
        column = first + tl.arange(0, TILE)[None, :]
        inside = (token[:, None] < tokens) & (column < size)
        x = tl.load(rows + column, mask=inside, other=0.0)
        least = tl.where(inside, x, float("inf"))
        most = tl.where(inside, x, float("-inf"))
        low = tl.minimum(low, tl.reduce(least, 1, tl.standard._elementwise_min))
        high = tl.maximum(high, tl.reduce(most, 1, tl.standard._elementwise_max))
    # Programs past the last token would compute with infinities.
    low = tl.where(token < tokens, low, 0.0)
    high = tl.where(token < tokens, high, 0.0)
    if type_id == _FP8:
        shift = saturate_fp16(low * 0.5 + high * 0.5)
        centre = shift.to(tl.float32)
        step = tl.div_rn(tl.maximum(high - centre, centre - low), E4M3_MAX)
    else:
        shift = saturate_fp16(low)
        reach = tl.maximum(high - shift.to(tl.float32), 0.0)
        step = tl.div_rn(reach, tl.where(type_id == _INT2, _TOP2, _TOP4))
    scale = saturate_fp16(tl.where(high > low, step, 0.0))
    scales = payloads + chunk * payload_bytes + group * tokens
    _store_scales(scales + token, token < tokens, num_groups * tokens, shift, scale)


@jit(do_not_specialize=("payload_bytes", "num_groups", "tokens"))
def _codes_kernel(  # type: ignore[no-untyped-def]
    coefficients,
    row_stride,
    payloads,
    payload_bytes,
    groups,
    tiles,
    num_groups,
    tokens,
    damaged,
    BYTES: tl.constexpr,
    PACK: tl.constexpr,
):
    """One program: a tile of bytes of one group's packed codes in one chunk."""
    tile = tl.program_id(0)
    chunk = tl.program_id(1).to(tl.int64)
    group = tl.load(tiles + 2 * tile).to(tl.int64)
    first = tl.load(tiles + 2 * tile + 1)
    start, size, type_id, offset = _group(groups, group)
    rows = coefficients + chunk * tokens * row_stride + start
    payload = payloads + chunk * payload_bytes
    scales = payload + group * tokens
    codes = payload + offset
    stream = num_groups * tokens
    flag = damaged + chunk
    if type_id == _INT2:
        _codes_tile(
            rows, row_stride, scales, codes, flag, first, size, stream, tokens, _BITS2, BYTES, PACK
        )
    elif type_id == _INT4:
        _codes_tile(
            rows, row_stride, scales, codes, flag, first, size, stream, tokens, _BITS4, BYTES, PACK
        )
    else:
        _codes_tile(
            rows, row_stride, scales, codes, flag, first, size, stream, tokens, _BITS8, BYTES, PACK
        )


@jit()
def _codes_tile(  # type: ignore[no-untyped-def]
    rows,
    row_stride,
    scales,
    codes,
    flag,
    first,
    size,
    stream,
    tokens,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    PACK: tl.constexpr,
):
    byte = first + tl.arange(0, BYTES)
    lane = tl.arange(0, 8 // BITS)[None, :]
    element = byte[:, None] * (8 // BITS) + lane
    token = element // size
    inside = token < tokens
    used = byte * (8 // BITS) < tokens * size
    place = rows + (token.to(tl.int64) * row_stride + element % size)
    shift, scale = _load_scales(scales + token, inside, stream)
    if PACK:
        x = tl.load(place, mask=inside, other=0.0)
        y = tl.div_rn(x - shift, tl.where(scale == 0, float("inf"), scale))
        if BITS == _BITS8:
            code = e4m3_encode(tl.minimum(tl.maximum(y, -E4M3_MAX), E4M3_MAX))
        else:
            code = round_to_code(y, _TOP2 if BITS == _BITS2 else _TOP4)
        packed = tl.where(inside, code, 0) << (lane * BITS)
        value = tl.reduce(packed, 1, tl.standard._sum_combine)
        tl.store(codes + byte, value.to(tl.uint8), mask=used)
    else:
        packed = tl.load(codes + byte, mask=used, other=0).to(tl.int32)
        code = (packed[:, None] >> (lane * BITS)) & (2**BITS - 1)
        level = e4m3_decode(code) if BITS == _BITS8 else code.to(tl.float32)
        x = level * scale + shift
        wrong = inside & ((x - x) != 0)
        tl.store(flag + element * 0, wrong.to(tl.int32), mask=wrong)
        if rows.dtype.element_ty == tl.float16:
            x = tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX)
        tl.store(place, x.to(rows.dtype.element_ty), mask=inside)


@jit()
def _group(groups, group):  # type: ignore[no-untyped-def]
    """A row of `PlanTables.groups`: first coefficient, size, type id, offset of the codes."""
    row = groups + 4 * group
    return tl.load(row), tl.load(row + 1).to(tl.int32), tl.load(row + 2), tl.load(row + 3)


@jit()
def _load_scales(high, mask, stream):  # type: ignore[no-untyped-def]
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
def _store_scales(high, mask, stream, shift, scale):  # type: ignore[no-untyped-def]
    """Write float16 shift and scale to where `_load_scales` reads them."""
    shift_bits = shift.to(tl.int16, bitcast=True).to(tl.int32)
    scale_bits = scale.to(tl.int16, bitcast=True).to(tl.int32)
    tl.store(high, (shift_bits >> 8).to(tl.uint8), mask=mask)
    tl.store(high + stream, (scale_bits >> 8).to(tl.uint8), mask=mask)
    tl.store(high + 2 * stream, shift_bits.to(tl.uint8), mask=mask)
    tl.store(high + 3 * stream, scale_bits.to(tl.uint8), mask=mask)


@jit()
def _join(high, low):  # type: ignore[no-untyped-def]
    bits = (high.to(tl.int32) << 8) | low.to(tl.int32)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
