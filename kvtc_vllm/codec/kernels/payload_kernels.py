"""Coefficients <-> payloads: ranges, codes and packing, bit for bit as `payload` has them.

All groups here are coefficient groups.
"""

from __future__ import annotations

import torch
import triton.language as tl

from kvtc_vllm.codec.kernels.bit_tables import (
    NARROW,
    NARROW_BYTES,
    TOKENS,
    WIDE,
    PlanTables,
)
from kvtc_vllm.codec.kernels.code_tiles import (
    BITS2,
    BITS4,
    BITS8,
    TOP2,
    TOP4,
    narrow_tile,
    wide_tile,
)
from kvtc_vllm.codec.kernels.jit import EXACT, jit
from kvtc_vllm.codec.kernels.numeric import E4M3_MAX, saturate_fp16
from kvtc_vllm.codec.kernels.resident import COLUMNS
from kvtc_vllm.codec.quantizers.fp8 import FP8
from kvtc_vllm.codec.quantizers.uniform import INT2, INT4

_INT2 = tl.constexpr(INT2.type_id)
_INT4 = tl.constexpr(INT4.type_id)
_FP8 = tl.constexpr(FP8.type_id)
_WIDE = tl.constexpr(WIDE)
_NARROW = tl.constexpr(NARROW)
_COLUMNS = tl.constexpr(COLUMNS)
_SIZES = ("payload_stride", "num_groups")
"""Arguments that differ from section to section."""


def encode_payloads(
    coefficients: torch.Tensor,
    tables: PlanTables,
    chunks: torch.Tensor,
    out: torch.Tensor,
    magnitudes: torch.Tensor,
) -> None:
    """Quantise and pack chunks, all sections of the tables: two launches.

    coefficients: float32 [R, tables.width], contiguous, aligned to 16 bytes, in the order of
    `Columns`, all within +-65504, else only `magnitudes` means anything. chunks: int64 [n, 3] on
    the device, see `RowLayout.table`. out: uint8 [n, tables.payload_stride], contiguous; every
    byte of the payloads is written. magnitudes: int32 [n], raised to the bits of the largest
    absolute value as float32, which order as the values do, NaN last.
    """
    if len(chunks) == 0 or tables.num_groups == 0:
        return
    token_tiles = -(-tables.lengths[-1] // TOKENS)
    _range_kernel[(tables.num_groups, token_tiles, len(chunks))](
        coefficients,
        coefficients.stride(0),
        out,
        tables.payload_stride,
        tables.groups,
        tables.num_groups,
        chunks,
        magnitudes,
        TOKENS=TOKENS,
        COLUMNS=COLUMNS,
        **EXACT,
    )
    # Packing marks no chunk as damaged: any pointer will do.
    _launch_codes(coefficients, out, tables, chunks, magnitudes, tables.coded_tiles, pack=True)


def decode_payloads(
    payloads: torch.Tensor,
    tables: PlanTables,
    chunks: torch.Tensor,
    out: torch.Tensor,
    damaged: torch.Tensor,
) -> None:
    """Unpack chunks, all sections of the tables: one launch.

    payloads: uint8 [n, tables.payload_stride], contiguous. chunks: as for `encode_payloads`. out:
    float32 or float16 [R, tables.width], contiguous, aligned to 16 bytes; every element is
    written. In float32 it equals `payload.decode_payload` bit for bit, apart from the order of
    columns; float16 is rounded from it and saturates. damaged: int32 [n], set to 1 (never to 0)
    for a chunk with a value that is not finite.
    """
    if len(chunks) and len(tables.tiles):
        _launch_codes(out, payloads, tables, chunks, damaged, len(tables.tiles), pack=False)


def _launch_codes(
    coefficients: torch.Tensor,
    payloads: torch.Tensor,
    tables: PlanTables,
    chunks: torch.Tensor,
    damaged: torch.Tensor,
    tiles: int,
    pack: bool,
) -> None:
    """Write packed codes from coefficients, or coefficients from them; scales are there."""
    _codes_kernel[(tiles, len(chunks))](
        coefficients,
        coefficients.stride(0),
        payloads,
        tables.payload_stride,
        tables.groups,
        tables.tiles,
        tables.num_groups,
        chunks,
        damaged,
        TOKENS=TOKENS,
        BYTES=NARROW_BYTES,
        PACK=pack,
        **EXACT,
    )


@jit(do_not_specialize=_SIZES)
def _range_kernel(  # type: ignore[no-untyped-def]
    coefficients,
    row_stride,
    payloads,
    payload_stride,
    groups,
    num_groups,
    chunks,
    magnitudes,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: shifts and scales of one group for a tile of tokens of one chunk."""
    group = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(2).to(tl.int64)
    first_row, tokens, length = _chunk(chunks, chunk)
    start, size, type_id, _ = _group(groups, length, num_groups, group)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    low = tl.full((TOKENS,), float("inf"), tl.float32)
    high = tl.full((TOKENS,), float("-inf"), tl.float32)
    bits = tl.full((TOKENS,), 0, tl.int32)
    rows = coefficients + (first_row + token)[:, None] * row_stride
    if size % COLUMNS == 0:
        # Wide groups begin at whole tiles, and so are read in whole words.
        tile = rows + tl.multiple_of(start, COLUMNS) + tl.arange(0, COLUMNS)[None, :]
        for first in range(0, size, COLUMNS):
            x = tl.load(tile + first, mask=inside[:, None], other=0.0)
            low, high, bits = _extremes(x, x, x, low, high, bits)
    else:
        tile = rows + start + tl.arange(0, COLUMNS)[None, :]
        for first in range(0, size, COLUMNS):
            part = inside[:, None] & (first + tl.arange(0, COLUMNS)[None, :] < size)
            x = tl.load(tile + first, mask=part, other=0.0)
            least = tl.where(part, x, float("inf"))
            most = tl.where(part, x, float("-inf"))
            low, high, bits = _extremes(x, least, most, low, high, bits)
    largest = tl.reduce(tl.where(inside, bits, 0), 0, tl.standard._elementwise_max)
    tl.atomic_max(magnitudes + chunk, largest)
    # Programs past the last token would compute with infinities.
    low = tl.where(inside, low, 0.0)
    high = tl.where(inside, high, 0.0)
    if type_id == _FP8:
        shift = saturate_fp16(low * 0.5 + high * 0.5)
        centre = shift.to(tl.float32)
        step = tl.div_rn(tl.maximum(high - centre, centre - low), E4M3_MAX)
    else:
        shift = saturate_fp16(low)
        reach = tl.maximum(high - shift.to(tl.float32), 0.0)
        step = tl.div_rn(reach, tl.where(type_id == _INT2, TOP2, TOP4))
    scale = saturate_fp16(tl.where(high > low, step, 0.0))
    place, stream = _scales(groups, length, num_groups, group)
    scales = payloads + chunk * payload_stride + place
    _store_scales(scales + token, inside, stream, shift, scale)


@jit()
def _extremes(x, least, most, low, high, bits):  # type: ignore[no-untyped-def]
    """Least and largest values and absolute bits of each row, with those found before."""
    low = tl.minimum(low, tl.reduce(least, 1, tl.standard._elementwise_min))
    high = tl.maximum(high, tl.reduce(most, 1, tl.standard._elementwise_max))
    absolute = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.maximum(bits, tl.reduce(absolute, 1, tl.standard._elementwise_max))
    return low, high, bits


# Flags of a wave of a load lie behind those of the wave before.
@jit(do_not_specialize=_SIZES, any_alignment=("damaged",))
def _codes_kernel(  # type: ignore[no-untyped-def]
    coefficients,
    row_stride,
    payloads,
    payload_stride,
    groups,
    tiles,
    num_groups,
    chunks,
    damaged,
    TOKENS: tl.constexpr,
    BYTES: tl.constexpr,
    PACK: tl.constexpr,
):
    """One program: a tile of one group's codes in one chunk."""
    tile = tiles + 4 * tl.program_id(0)
    kind = tl.load(tile)
    chunk = tl.program_id(1).to(tl.int64)
    first_row, tokens, length = _chunk(chunks, chunk)
    rows = coefficients + first_row * row_stride
    if kind == _WIDE:
        group = tl.load(tile + 1).to(tl.int64)
        start, size, type_id, offset = _group(groups, length, num_groups, group)
        payload = payloads + chunk * payload_stride
        column = tl.load(tile + 3)
        rows += tl.multiple_of(start + column, _COLUMNS)
        codes = payload + offset
        begin, stream = _scales(groups, length, num_groups, group)
        scales = payload + begin
        token = tl.load(tile + 2) + tl.arange(0, TOKENS)
        flag = damaged + chunk
        if type_id == _INT2:
            wide_tile(
                rows, row_stride, scales, codes, flag, token, column, size, stream, tokens,
                BITS2, PACK,
            )  # fmt: skip
        elif type_id == _INT4:
            wide_tile(
                rows, row_stride, scales, codes, flag, token, column, size, stream, tokens,
                BITS4, PACK,
            )  # fmt: skip
        else:
            wide_tile(
                rows, row_stride, scales, codes, flag, token, column, size, stream, tokens,
                BITS8, PACK,
            )  # fmt: skip
    elif kind == _NARROW:
        group = tl.load(tile + 1).to(tl.int64)
        start, size, type_id, offset = _group(groups, length, num_groups, group)
        payload = payloads + chunk * payload_stride
        rows += start
        codes = payload + offset
        begin, stream = _scales(groups, length, num_groups, group)
        scales = payload + begin
        byte = tl.load(tile + 2) + tl.arange(0, BYTES)
        flag = damaged + chunk
        if type_id == _INT2:
            narrow_tile(
                rows, row_stride, scales, codes, flag, byte, size, stream, tokens, BITS2, PACK
            )
        elif type_id == _INT4:
            narrow_tile(
                rows, row_stride, scales, codes, flag, byte, size, stream, tokens, BITS4, PACK
            )
        else:
            narrow_tile(
                rows, row_stride, scales, codes, flag, byte, size, stream, tokens, BITS8, PACK
            )
    elif not PACK:
        row = tl.load(tile + 1) + tl.arange(0, TOKENS)[:, None]
        gap = tl.arange(0, _COLUMNS)[None, :]
        zeros = tl.full((TOKENS, _COLUMNS), 0.0, coefficients.dtype.element_ty)
        place = rows + row * row_stride + tl.load(tile + 2) + gap
        tl.store(place, zeros, mask=(row < tokens) & (gap < tl.load(tile + 3)))


@jit()
def _chunk(chunks, chunk):  # type: ignore[no-untyped-def]
    """A row of `RowLayout.table`: first row, tokens, which of the lengths they are."""
    row = chunks + 3 * chunk
    return tl.load(row), tl.load(row + 1).to(tl.int32), tl.load(row + 2)


@jit()
def _group(groups, length, num_groups, group):  # type: ignore[no-untyped-def]
    """A row of `PlanTables.groups`: first column, size, type id, offset of the codes."""
    row = groups + 6 * (length * num_groups + group)
    return tl.load(row), tl.load(row + 1).to(tl.int32), tl.load(row + 2), tl.load(row + 3)


@jit()
def _scales(groups, length, num_groups, group):  # type: ignore[no-untyped-def]
    """The rest of such a row: offset of the scales, bytes from one stream of them to the next."""
    row = groups + 6 * (length * num_groups + group) + 4
    return tl.load(row), tl.load(row + 1).to(tl.int32)


@jit()
def _store_scales(high, mask, stream, shift, scale):  # type: ignore[no-untyped-def]
    """Write float16 shift and scale to where `code_tiles.load_scales` reads them."""
    shift_bits = shift.to(tl.int16, bitcast=True).to(tl.int32)
    scale_bits = scale.to(tl.int16, bitcast=True).to(tl.int32)
    tl.store(high, (shift_bits >> 8).to(tl.uint8), mask=mask)
    tl.store(high + stream, (scale_bits >> 8).to(tl.uint8), mask=mask)
    tl.store(high + 2 * stream, shift_bits.to(tl.uint8), mask=mask)
    tl.store(high + 3 * stream, scale_bits.to(tl.uint8), mask=mask)
