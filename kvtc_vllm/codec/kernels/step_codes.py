"""Packed codes of step plans inside kernels: where they lie, and what they are in a tile.

A tile is `COLUMNS` columns of one width and all tokens of a chunk, `TOKENS` at a time.
"""

from __future__ import annotations

import triton.language as tl

from kvtc_vllm.codec.kernels.jit import jit
from kvtc_vllm.codec.kernels.resident import COLUMNS
from kvtc_vllm.codec.kernels.step_tables import TOKENS
from kvtc_vllm.codec.v2.codes import WIDE, WIDE_BYTES

TILE_COLUMNS = tl.constexpr(COLUMNS)
TILE_TOKENS = tl.constexpr(TOKENS)
TILE_WARPS = 4
"""Warps of a program that works on a tile."""
IS_WIDE = tl.constexpr(WIDE)
PER_WIDE = tl.constexpr(WIDE_BYTES)


@jit()
def tile_of(tiles, number):  # type: ignore[no-untyped-def]
    """A row of `StepTables.tiles`: section, bits, first column, first in stored order."""
    row = tiles + 4 * number
    section = tl.load(row).to(tl.int64)
    return section, tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@jit()
def part_of(parts, section, chunks, chunk):  # type: ignore[no-untyped-def]
    """A payload: where it begins, its bytes, tokens, first row."""
    row = parts + 4 * (section * chunks + chunk)
    return tl.load(row), tl.load(row + 1), tl.load(row + 2).to(tl.int32), tl.load(row + 3)


@jit()
def columns_of(counts, section):  # type: ignore[no-untyped-def]
    """A row of `StepTables.counts`: columns of 2, 4 and 8 bits, the first among all."""
    row = counts + 4 * section
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3).to(tl.int64)


@jit()
def target_of(targets, section):  # type: ignore[no-untyped-def]
    """A row of `StepTables.targets`."""
    row = targets + 5 * section
    first, key_width = tl.load(row + 1).to(tl.int64), tl.load(row + 2).to(tl.int64)
    width = tl.multiple_of(tl.load(row + 3), TILE_COLUMNS).to(tl.int64)
    return tl.load(row).to(tl.int64), first, key_width, width, tl.load(row + 4)


@jit()
def packed_sizes(two, four, eight, tokens):  # type: ignore[no-untyped-def]
    """Bytes of the packed codes of each width, int64."""
    length = tokens.to(tl.int64)
    return two * ((length + 3) // 4), four * ((length + 1) // 2), eight * length


@jit()
def load_codes(packed, used, first, tokens, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes int32 [TOKENS, COLUMNS] from token `first` on; 0 where there are none.

    packed: where the codes of each column begin, [COLUMNS]. used: which of the columns are.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    byte = first // PER_BYTE + tl.arange(0, TILE_TOKENS // PER_BYTE)
    there = (byte * PER_BYTE < tokens)[:, None] & used[None, :]
    value = tl.load(packed[None, :] + byte[:, None], mask=there, other=0).to(tl.int32)
    if BITS == 8:
        code = value
    else:
        lane = tl.arange(0, PER_BYTE)[None, :, None]
        split = (value[:, None, :] >> (lane * BITS)) & (2**BITS - 1)
        code = tl.reshape(split, (TILE_TOKENS, TILE_COLUMNS))
    token = first + tl.arange(0, TILE_TOKENS)
    return tl.where((token < tokens)[:, None] & used[None, :], code, 0)


@jit()
def store_codes(code, packed, used, first, size, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Inverse of `load_codes`. size: bytes of a column."""
    PER_BYTE: tl.constexpr = 8 // BITS
    byte = first // PER_BYTE + tl.arange(0, TILE_TOKENS // PER_BYTE)
    if BITS == 8:
        value = code
    else:
        lane = tl.arange(0, PER_BYTE)[None, :, None]
        split = tl.reshape(code, (TILE_TOKENS // PER_BYTE, PER_BYTE, TILE_COLUMNS))
        value = tl.reduce(split << (lane * BITS), 1, tl.standard._sum_combine)
    place = packed[None, :] + byte[:, None]
    tl.store(place, value.to(tl.uint8), mask=(byte < size)[:, None] & used[None, :])


@jit()
def before(flags):  # type: ignore[no-untyped-def]
    """How many flags, int32 0 or 1, [TOKENS, COLUMNS], come before each in its column."""
    upto = tl.associative_scan(flags, 0, tl.standard._sum_combine)
    return (upto - flags).to(tl.int32)


@jit()
def any_of(flags):  # type: ignore[no-untyped-def]
    """Whether one of int32 [TOKENS, COLUMNS] is set: wide escapes are rare."""
    rows = tl.reduce(flags, 1, tl.standard._elementwise_max)
    return tl.reduce(rows, 0, tl.standard._elementwise_max) > 0


@jit()
def column_sums(x):  # type: ignore[no-untyped-def]
    """Of int32 [n, COLUMNS]."""
    return tl.reduce(x, 0, tl.standard._sum_combine)


@jit()
def exclusive_sums(source, target, columns, carry, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """target[i] = carry + the sum of source[:i]; returns carry + the sum of all. int32.

    carry: no constant, whose type sums would change.
    """
    for first in range(0, columns, BLOCK):
        place = first + tl.arange(0, BLOCK)
        x = tl.load(source + place, mask=place < columns, other=0)
        upto = tl.associative_scan(x, 0, tl.standard._sum_combine)
        tl.store(target + place, (carry + upto - x).to(tl.int32), mask=place < columns)
        carry += tl.reduce(x, 0, tl.standard._sum_combine)
    return carry


@jit()
def filled(columns):  # type: ignore[no-untyped-def]
    """Resident columns of a width of so many."""
    return (columns + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS
