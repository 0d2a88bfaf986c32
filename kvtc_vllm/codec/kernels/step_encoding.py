"""Coefficients -> payloads of step plans, bit for bit as `v2` has them.

Packed codes have their place. Escapes follow in a pool that all payloads of a step share: how many
there are is known when the packed codes are written, and then they are computed a second time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from kvtc_vllm.codec.kernels.jit import EXACT, jit
from kvtc_vllm.codec.kernels.step_codes import (
    IS_WIDE,
    PER_WIDE,
    TILE_COLUMNS,
    TILE_TOKENS,
    TILE_WARPS,
    any_of,
    before,
    column_sums,
    columns_of,
    exclusive_sums,
    filled,
    packed_sizes,
    part_of,
    store_codes,
    target_of,
    tile_of,
)
from kvtc_vllm.codec.kernels.step_tables import StepTables
from kvtc_vllm.codec.v2.codes import MAX_LEVEL

_MAX_LEVEL = tl.constexpr(float(MAX_LEVEL))
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_BLOCK = 256
PLACE = 5
"""Numbers of a payload's escapes: first byte in the pool, escapes of each width, wide ones."""
_PLACE = tl.constexpr(PLACE)
_SIZES = ("chunks", "num_columns", "capacity", "num_rows", "marked_rows", "own_columns")


@dataclass(frozen=True)
class PayloadPool:
    """Where the payloads of a step go, on the device.

    codes: uint8, packed codes. escapes: uint8; what does not fit is left out. parts: int64 [S,
    chunks, 4]: first byte of a payload's packed codes, any number, tokens, first row. counted:
    int32 [chunks, G] each, for the kernels' own use. places: int64 [S, chunks, PLACE], zeros, out.
    used: int64 [1], bytes of `escapes` that are taken, raised. magnitudes: int32 [chunks], raised
    to the bits of the largest coefficient in steps; infinity and NaN only if it is one.
    """

    codes: torch.Tensor
    escapes: torch.Tensor
    parts: torch.Tensor
    chunks: int
    counted: tuple[torch.Tensor, torch.Tensor]
    places: torch.Tensor
    used: torch.Tensor
    magnitudes: torch.Tensor


def encode_sections(
    coefficients: torch.Tensor,
    rows: tuple[int, int],
    tables: StepTables,
    pool: PayloadPool,
    marks: torch.Tensor | None,
) -> None:
    """Quantise and pack all sections, and put their escapes into the pool: three launches.

    coefficients: float32, in the resident units, [rows, width] of one section after the other:
    first those of all coded tokens, then those of what is beyond them. rows: of the former, of the
    latter. marks: int64 [R], positive where coefficients are multiplied by the gain, as all of
    those beyond are; None if blobs do not say.
    """
    tiles, sections = len(tables.tiles), len(tables.sections)
    if not tiles:
        return

    def codes(escapes: bool) -> None:
        _encode_kernel[(tiles, pool.chunks)](
            coefficients,
            *rows,
            tables.own_columns,
            coefficients if marks is None else marks,
            pool.codes,
            pool.escapes,
            pool.escapes.numel(),
            pool.parts,
            pool.chunks,
            tables.counts,
            tables.targets,
            tables.tiles,
            *pool.counted,
            tables.num_columns,
            pool.places,
            tables.rounding,
            tables.numbers,
            pool.magnitudes,
            MARKED=marks is not None,
            ESCAPES=escapes,
            num_warps=TILE_WARPS,
            **EXACT,
        )

    codes(escapes=False)
    _take_kernel[(sections, pool.chunks)](
        tables.counts,
        pool.chunks,
        *pool.counted,
        tables.num_columns,
        pool.places,
        pool.used,
        BLOCK=_BLOCK,
    )
    codes(escapes=True)


@jit(do_not_specialize=_SIZES)
def _take_kernel(  # type: ignore[no-untyped-def]
    counts,
    chunks,
    escapes,
    wides,
    num_columns,
    places,
    used,
    BLOCK: tl.constexpr,
):
    """One program: one payload. Counts become where each column's escapes begin, and take room."""
    section = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    two, four, eight, first = columns_of(counts, section)
    at = chunk * num_columns + first
    own, wide = escapes + at, wides + at
    end2 = filled(two)
    end4 = end2 + filled(four)
    after2 = exclusive_sums(own, own, end2, end2 * 0, BLOCK)
    after4 = exclusive_sums(own + end2, own + end2, filled(four), after2, BLOCK)
    after8 = exclusive_sums(own + end4, own + end4, filled(eight), after4, BLOCK)
    large = exclusive_sums(wide, wide, end4 + filled(eight), end2 * 0, BLOCK)
    size = after8.to(tl.int64) + large.to(tl.int64) * PER_WIDE
    place = places + (section * chunks + chunk) * _PLACE
    tl.store(place, tl.atomic_add(used, size))
    tl.store(place + 1, after2.to(tl.int64))
    tl.store(place + 2, (after4 - after2).to(tl.int64))
    tl.store(place + 3, (after8 - after4).to(tl.int64))
    tl.store(place + 4, large.to(tl.int64))


@jit(do_not_specialize=_SIZES, any_alignment=("out", "pool"))
def _encode_kernel(  # type: ignore[no-untyped-def]
    coefficients,
    num_rows,
    marked_rows,
    own_columns,
    marks,
    out,
    pool,
    capacity,
    parts,
    chunks,
    counts,
    targets,
    tiles,
    escapes,
    wides,
    num_columns,
    places,
    rounding,
    numbers,
    magnitudes,
    MARKED: tl.constexpr,
    ESCAPES: tl.constexpr,
):
    """One program: packed codes of a tile's columns in one chunk and how many escapes they have,
    or these escapes."""
    section, bits, column, index = tile_of(tiles, tl.program_id(0))
    chunk = tl.program_id(1).to(tl.int64)
    offset, _, tokens, first_row = part_of(parts, section, chunks, chunk)
    two, four, eight, first = columns_of(counts, section)
    size2, size4, _ = packed_sizes(two, four, eight, tokens)
    lane = tl.arange(0, TILE_COLUMNS)
    known = rounding + first + column + lane
    dead, shift = tl.load(known), tl.load(known + num_columns)
    counted = chunk * num_columns + first + column + lane
    earlier, _, _, row_stride, _ = target_of(targets, section)
    beyond = (section & 1).to(tl.int32) if MARKED else 0
    begin = earlier * num_rows
    if MARKED:
        after = own_columns.to(tl.int64) * num_rows + earlier * marked_rows
        begin = tl.where(beyond != 0, after, begin)
    source = coefficients + begin + column + lane
    numbers += section * 3
    packed = out + offset
    place = places + (section * chunks + chunk) * _PLACE
    own = index + lane
    if bits == 2:
        encode_tile(
            source, row_stride, marks, beyond, first_row, packed, own, own < two, tokens, dead,
            shift, numbers, escapes + counted, wides + counted, place, pool, capacity,
            magnitudes + chunk, 2, MARKED, ESCAPES,
        )  # fmt: skip
    elif bits == 4:
        encode_tile(
            source, row_stride, marks, beyond, first_row, packed + size2, own, own < four, tokens,
            dead, shift, numbers, escapes + counted, wides + counted, place, pool, capacity,
            magnitudes + chunk, 4, MARKED, ESCAPES,
        )  # fmt: skip
    else:
        encode_tile(
            source, row_stride, marks, beyond, first_row, packed + size2 + size4, own, own < eight,
            tokens, dead, shift, numbers, escapes + counted, wides + counted, place, pool, capacity,
            magnitudes + chunk, 8, MARKED, ESCAPES,
        )  # fmt: skip


@jit()
def encode_tile(  # type: ignore[no-untyped-def]
    source,
    row_stride,
    marks,
    beyond,
    first_row,
    codes,
    own,
    used,
    tokens,
    dead,
    shift,
    numbers,
    escapes,
    wides,
    place,
    pool,
    capacity,
    magnitude,
    BITS: tl.constexpr,
    MARKED: tl.constexpr,
    ESCAPES: tl.constexpr,
):
    """escapes, wides: of each column, how many it has, out, or how many come before them.

    beyond: 1 for what is beyond, whose rows are all marked; else 0.
    """
    ESCAPE: tl.constexpr = 2**BITS - 1
    size = (tokens * BITS + 7) // 8
    packed = codes + own.to(tl.int64) * size
    inverse, gain = tl.load(numbers + 1), tl.load(numbers + 2)
    if ESCAPES:
        start = tl.load(place)
        narrow = tl.load(place + 1) + tl.load(place + 2) + tl.load(place + 3)
        # Nothing of what does not fit as a whole.
        end = start + narrow + tl.load(place + 4) * PER_WIDE
        last = tl.where(end <= capacity, tokens, 0)
        low = start + tl.load(escapes)
        high = start + narrow + tl.load(wides).to(tl.int64) * PER_WIDE
    else:
        last = tokens
        # Summed up over the columns at the end: every such sum makes the warps wait.
        narrow_count = tl.full((TILE_TOKENS, TILE_COLUMNS), 0, tl.int32)
        wide_count = tl.full((TILE_TOKENS, TILE_COLUMNS), 0, tl.int32)
        largest = tl.full((TILE_TOKENS, TILE_COLUMNS), 0, tl.int32)
    for first in range(0, last, TILE_TOKENS):
        token = first + tl.arange(0, TILE_TOKENS)
        there = (token < tokens)[:, None] & used[None, :]
        row = first_row + token
        x = tl.load(source[None, :] + row[:, None] * row_stride, mask=there, other=0.0)
        if MARKED:
            mark = tl.load(marks + row, mask=token < tokens * (1 - beyond), other=1)
            x *= tl.where(mark > 0, gain, 1.0)[:, None]
        steps = tl.abs(x) * inverse
        # Beyond it the chunk is refused, and takes no room for escapes. None is negative: the
        # conversion rounds down.
        level = (tl.where(steps < _MAX_LEVEL, steps, 0.0) + shift[None, :]).to(tl.int32)
        level = tl.where(steps < dead[None, :], 0, level)
        code = tl.maximum(2 * level - tl.where(x > 0, 1, 0), 0)
        rest = code - ESCAPE
        escape = tl.where(there & (rest >= 0), 1, 0)
        wide = tl.where(there & (rest >= IS_WIDE), 1, 0)
        if ESCAPES:
            at = pool + low[None, :] + before(escape)
            byte = tl.minimum(rest, IS_WIDE)
            tl.store(at, byte.to(tl.uint8), mask=escape != 0)
            low += column_sums(escape)
            if any_of(wide):
                at = pool + high[None, :] + before(wide) * PER_WIDE
                more = rest - IS_WIDE
                tl.store(at, more.to(tl.uint8), mask=wide != 0)
                tl.store(at + 1, (more >> 8).to(tl.uint8), mask=wide != 0)
                high += column_sums(wide) * PER_WIDE
        else:
            kept = tl.where(there, tl.minimum(code, ESCAPE), 0)
            store_codes(kept, packed, used, first, size, BITS)
            narrow_count += escape
            wide_count += wide
            # Infinite only if the coefficient is.
            finite = tl.where(steps < _LARGEST, steps, _LARGEST)
            finite = tl.where(tl.abs(x) <= _LARGEST, finite, tl.abs(x))
            bits = tl.where(there, finite.to(tl.int32, bitcast=True), 0)
            largest = tl.maximum(largest, bits)
    if not ESCAPES:
        tl.store(escapes, column_sums(narrow_count))
        tl.store(wides, column_sums(wide_count))
        by_column = tl.reduce(largest, 0, tl.standard._elementwise_max)
        tl.atomic_max(magnitude, tl.reduce(by_column, 0, tl.standard._elementwise_max))
