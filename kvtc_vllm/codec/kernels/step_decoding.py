"""Payloads of step plans -> coefficients, bit for bit as `v2` has them.

Where an escape lies follows from how many come before it. So codes are read twice: first the
escapes of every column are counted, then the wide ones among them, and running sums of both tell
where those of a column begin. A payload whose escapes do not end where it does is told.
"""

from __future__ import annotations

import torch
import triton.language as tl

from kvtc_vllm.codec.kernels.code_tiles import store_coefficients
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
    load_codes,
    packed_sizes,
    part_of,
    target_of,
    tile_of,
)
from kvtc_vllm.codec.kernels.step_tables import StepTables

_LANES = tl.constexpr(16)
"""Escapes of a column that are looked at together."""
_BLOCK = 256
UNEVEN = 1
"""Flag of a chunk whose escapes do not come out even."""
_UNEVEN = tl.constexpr(UNEVEN)
_SIZES = ("chunks", "num_columns", "num_rows", "marked_rows", "own_columns")


def find_escapes(
    payloads: torch.Tensor,
    parts: torch.Tensor,
    chunks: int,
    tables: StepTables,
    escapes: torch.Tensor,
    wides: torch.Tensor,
    totals: torch.Tensor,
    damaged: torch.Tensor,
) -> None:
    """Where the escapes of every column begin, in every payload of every section.

    payloads: uint8. parts: int64 [S, chunks, 4]: first byte of a payload, bytes, tokens, first
    row; none is shorter than its packed codes. escapes, wides: int32 [chunks, G], out: escapes and
    wide escapes before those of the column. totals: int32 [S, chunks], out: escapes of a payload.
    damaged: int32 [chunks], set to `UNEVEN` for a chunk with a payload of another length.
    """
    tiles, sections = len(tables.tiles), len(tables.sections)
    for wide in (False, True):
        _count_kernel[(tiles, chunks)](
            payloads,
            parts,
            chunks,
            tables.counts,
            tables.tiles,
            escapes,
            wides,
            tables.num_columns,
            ESCAPES=not wide,
            **EXACT,
        )
        _place_kernel[(sections, chunks)](
            payloads,
            parts,
            chunks,
            tables.counts,
            escapes,
            wides,
            tables.num_columns,
            totals,
            damaged,
            WIDE=wide,
            BLOCK=_BLOCK,
            **EXACT,
        )


def decode_sections(
    payloads: torch.Tensor,
    parts: torch.Tensor,
    chunks: int,
    tables: StepTables,
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    rows: tuple[int, int],
    marks: torch.Tensor | None,
) -> None:
    """Coefficients of all sections: one launch.

    payloads, parts: as for `find_escapes`. found: escapes, wides and totals, which it has filled.
    out: float32 or float16, one key after the other: [R, width] of all coded tokens, then [M, total
    width] of the marked ones; every element of them is written, in the resident unit, divided by
    the gain where the token is marked; float16 is rounded. rows: R and M. marks: int64 [R], 0, or
    1 + the place of a marked token among those of the step; None if blobs do not say.
    """
    if not len(tables.tiles):
        return
    escapes, wides, totals = found
    _unpack_kernel[(len(tables.tiles), chunks)](
        out,
        *rows,
        tables.own_columns,
        out if marks is None else marks,
        payloads,
        parts,
        chunks,
        tables.counts,
        tables.targets,
        tables.tiles,
        escapes,
        wides,
        tables.num_columns,
        totals,
        tables.known,
        tables.values,
        tables.numbers,
        MARKED=marks is not None,
        num_warps=TILE_WARPS,
        **EXACT,
    )


@jit(do_not_specialize=_SIZES)
def _count_kernel(  # type: ignore[no-untyped-def]
    payloads,
    parts,
    chunks,
    counts,
    tiles,
    escapes,
    wides,
    num_columns,
    ESCAPES: tl.constexpr,
):
    """One program: of the columns of a tile in one chunk, escapes, or wide ones among them.

    Both are left in `wides`: where the former begin is known before the latter are counted.
    """
    section, bits, column, index = tile_of(tiles, tl.program_id(0))
    chunk = tl.program_id(1).to(tl.int64)
    offset, length, tokens, _ = part_of(parts, section, chunks, chunk)
    two, four, eight, first = columns_of(counts, section)
    size2, size4, size8 = packed_sizes(two, four, eight, tokens)
    place = chunk * num_columns + first + column + tl.arange(0, TILE_COLUMNS)
    payload = payloads + offset
    if ESCAPES:
        own = index + tl.arange(0, TILE_COLUMNS)
        if bits == 2:
            found = _escapes_of(payload, own, own < two, tokens, 2)
        elif bits == 4:
            found = _escapes_of(payload + size2, own, own < four, tokens, 4)
        else:
            found = _escapes_of(payload + size2 + size4, own, own < eight, tokens, 8)
    else:
        begin = size2 + size4 + size8 + tl.load(escapes + place)
        count = tl.load(wides + place)
        found = tl.full((TILE_COLUMNS,), 0, tl.int32)
        for lanes in range(0, tl.reduce(count, 0, tl.standard._elementwise_max), _LANES):
            lane = lanes + tl.arange(0, _LANES)[:, None]
            at = begin[None, :] + lane
            mask = (lane < count[None, :]) & (at < length)
            low = tl.load(payload + at, mask=mask, other=0)
            found += column_sums(tl.where(low == IS_WIDE, 1, 0))
    tl.store(wides + place, found)


@jit()
def _escapes_of(payload, own, used, tokens, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Escapes in each column of a tile, int32 [COLUMNS]. own: columns in stored order."""
    packed = payload + own.to(tl.int64) * ((tokens * BITS + 7) // 8)
    found = tl.full((TILE_COLUMNS,), 0, tl.int32)
    for first in range(0, tokens, TILE_TOKENS):
        code = load_codes(packed, used, first, tokens, BITS)
        found += column_sums(tl.where(code == 2**BITS - 1, 1, 0))
    return found


@jit(do_not_specialize=_SIZES, any_alignment=("damaged",))
def _place_kernel(  # type: ignore[no-untyped-def]
    payloads,
    parts,
    chunks,
    counts,
    escapes,
    wides,
    num_columns,
    totals,
    damaged,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one payload. Counts of its columns become where each column's begin."""
    section = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    _, length, tokens, _ = part_of(parts, section, chunks, chunk)
    two, four, eight, first = columns_of(counts, section)
    columns = filled(two) + filled(four) + filled(eight)
    place = chunk * num_columns + first
    target = wides if WIDE else escapes
    found = exclusive_sums(wides + place, target + place, columns, columns * 0, BLOCK)
    total = totals + section * chunks + chunk
    if WIDE:
        size2, size4, size8 = packed_sizes(two, four, eight, tokens)
        end = size2 + size4 + size8 + tl.load(total) + found.to(tl.int64) * PER_WIDE
        tl.store(damaged + chunk, _UNEVEN, mask=end != length)
    else:
        tl.store(total, found)


@jit(do_not_specialize=_SIZES)
def _unpack_kernel(  # type: ignore[no-untyped-def]
    coefficients,
    num_rows,
    marked_rows,
    own_columns,
    marks,
    payloads,
    parts,
    chunks,
    counts,
    targets,
    tiles,
    escapes,
    wides,
    num_columns,
    totals,
    known,
    values,
    numbers,
    MARKED: tl.constexpr,
):
    """One program: the coefficients of a tile's columns in one chunk."""
    section, bits, column, index = tile_of(tiles, tl.program_id(0))
    chunk = tl.program_id(1).to(tl.int64)
    offset, length, tokens, first_row = part_of(parts, section, chunks, chunk)
    two, four, eight, first = columns_of(counts, section)
    size2, size4, size8 = packed_sizes(two, four, eight, tokens)
    lane = tl.arange(0, TILE_COLUMNS)
    place = chunk * num_columns + first + column + lane
    payload = payloads + offset
    begin = size2 + size4 + size8
    low = begin + tl.load(escapes + place)
    high = begin + tl.load(totals + section * chunks + chunk) + tl.load(wides + place) * PER_WIDE
    own = index + lane
    values += tl.load(known + first + column + lane) - 1
    earlier, key_first, key_width, width, listed = target_of(targets, section)
    beyond = (section & 1).to(tl.int32) if MARKED else 0
    marked_at = own_columns.to(tl.int64) * num_rows + key_first * marked_rows
    target = earlier * num_rows
    row_stride = width
    if MARKED:
        target = tl.where(beyond != 0, marked_at + key_width - width, target)
        row_stride = tl.where(beyond != 0, key_width, width)
    target = coefficients + target + column + lane
    copied = coefficients + marked_at + column + lane
    numbers += section * 3
    if bits == 2:
        unpack_tile(
            target, row_stride, copied, key_width, marks, beyond, first_row, payload, payload,
            own, own < two, low, high, length, tokens, values, listed, numbers, 2, MARKED,
        )  # fmt: skip
    elif bits == 4:
        unpack_tile(
            target, row_stride, copied, key_width, marks, beyond, first_row, payload,
            payload + size2, own, own < four, low, high, length, tokens, values, listed, numbers,
            4, MARKED,
        )  # fmt: skip
    else:
        unpack_tile(
            target, row_stride, copied, key_width, marks, beyond, first_row, payload,
            payload + size2 + size4, own, own < eight, low, high, length, tokens, values, listed,
            numbers, 8, MARKED,
        )  # fmt: skip


@jit()
def unpack_tile(  # type: ignore[no-untyped-def]
    target,
    row_stride,
    copied,
    marked_stride,
    marks,
    beyond,
    first_row,
    payload,
    codes,
    own,
    used,
    low,
    high,
    length,
    tokens,
    known,
    listed,
    numbers,
    BITS: tl.constexpr,
    MARKED: tl.constexpr,
):
    """low, high: of each column, where its escapes and its wide ones begin in the payload.

    known: of each column, where the value of level 1 is, less one element. beyond: 1 for what is
    beyond, whose rows are all marked; else 0. copied: of each column, where its coefficients of
    marked tokens go, too.
    """
    packed = codes + own.to(tl.int64) * ((tokens * BITS + 7) // 8)
    step, gain = tl.load(numbers), tl.load(numbers + 2)
    for first in range(0, tokens, TILE_TOKENS):
        code = load_codes(packed, used, first, tokens, BITS)
        escape = tl.where(code == 2**BITS - 1, 1, 0)
        # Only inside the payload, whatever a damaged one asks for.
        at = low[None, :] + before(escape)
        byte = tl.load(payload + at, mask=(escape != 0) & (at < length), other=0).to(tl.int32)
        code += byte
        low += column_sums(escape)
        wide = tl.where(byte == IS_WIDE, 1, 0)
        if any_of(wide):
            at = high[None, :] + before(wide) * PER_WIDE
            more = tl.load(payload + at, mask=(wide != 0) & (at < length), other=0).to(tl.int32)
            most = tl.load(payload + at + 1, mask=(wide != 0) & (at + 1 < length), other=0)
            code += more + (most.to(tl.int32) << 8)
            high += column_sums(wide) * PER_WIDE
        level = (code + 1) >> 1
        tabled = (level > 0) & (level <= listed)
        x = tl.load(known[None, :] + level, mask=tabled, other=0.0)
        x = tl.where(level > listed, level.to(tl.float32) * step, x)
        x = tl.where((code & 1) != 0, x, -x)
        token = first + tl.arange(0, TILE_TOKENS)
        inside = (token < tokens)[:, None]
        row = first_row + token
        if MARKED:
            mark = tl.load(marks + row, mask=token < tokens * (1 - beyond), other=0)
            # Most tiles have no marked token, and a correctly rounded division is expensive.
            if tl.reduce(mark + beyond, 0, tl.standard._elementwise_max) > 0:
                divisor = tl.where(mark + beyond > 0, gain, 1.0)
                x = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
        store_coefficients(target[None, :] + row[:, None] * row_stride, x, inside)
        if MARKED:
            place = copied[None, :] + (mark - 1)[:, None] * marked_stride
            store_coefficients(place, x, inside & (mark > 0)[:, None])
