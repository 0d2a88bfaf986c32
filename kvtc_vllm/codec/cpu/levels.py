"""Compiled quantisation, packing and their inverses for step plans, one width per call.

Codes and bytes are those of `kvtc_vllm.codec.v2`, bit for bit from the same coefficients. All that
is done to every code goes along rows, where loops are long and vectorise: they see arrays without
gaps and indices that can't be negative. What lies in a payload column by column is turned as bytes.
Escapes are few: they are found in words of codes, and sorted by their column by counting. Importing
this imports numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtc_vllm.codec.cpu.jit import jit
from kvtc_vllm.codec.cpu.rows import Bytes, Floats, Integers

Counts = npt.NDArray[np.uint32]
Words64 = npt.NDArray[np.uint64]

_BLOCK = 64
"""Columns that are turned at once: a cache line of a row."""
_WORD = 8
"""Rows that are turned at once: a word of a column."""
_WIDE = 255
_ONES = np.uint64(0x0101010101010101)
_TOPS = np.uint64(0x8080808080808080)


@jit
def _whole_words(count: int) -> int:
    return (count + _WORD - 1) // _WORD * _WORD


@jit
def _code(
    x: np.float32, inverse_step: np.float32, dead: np.float32, offset: np.float32
) -> np.int32:
    """Of a coefficient; without branches, so that loops of it vectorise."""
    scaled = abs(x) * inverse_step
    level = np.int32(scaled + offset)
    level = np.int32(0) if scaled < dead else level
    positive = np.int32(1) if x > np.float32(0.0) else np.int32(0)
    return max(np.int32(level + level - positive), np.int32(0))


@jit
def _row_codes(
    row: Floats,
    inverse_step: np.float32,
    dead: Floats,
    offset: Floats,
    escape: np.int32,
    codes: Bytes,
) -> None:
    """Codes of one token, those that have an escape as `escape`."""
    for j in range(len(row)):
        codes[j] = np.uint8(min(_code(row[j], inverse_step, dead[j], offset[j]), escape))


@jit
def _add_lane(codes: Bytes, shift: np.uint8, packed: Bytes) -> None:
    """A token's codes into the bytes that it shares."""
    for j in range(len(codes)):
        packed[j] |= np.uint8(codes[j] << shift)


@jit
def _take_lane(packed: Bytes, shift: np.uint8, escape: np.uint8, codes: Bytes) -> None:
    """Inverse of `_add_lane`."""
    for j in range(len(codes)):
        codes[j] = np.uint8(np.uint8(packed[j] >> shift) & escape)


@jit
def _count(codes: Bytes, escape: np.uint8, found: Counts) -> None:
    """Add to each column's escapes those of a token."""
    for j in range(len(codes)):
        found[j] += np.uint32(codes[j] == escape)


@jit
def _has_zero(word: np.uint64) -> bool:
    """Whether one of its bytes is zero."""
    low = np.uint64(word - _ONES)
    return bool(np.uint64(low & np.uint64(~word & _TOPS)) != np.uint64(0))


@jit
def _find(words: Words64, pattern: np.uint64, found: Integers) -> int:
    """Numbers of words that have a byte of `pattern`; gives how many there are."""
    count = 0
    for i in range(len(words)):
        found[count] = i
        count += int(_has_zero(np.uint64(words[i] ^ pattern)))
    return count


@jit
def _places(codes: Bytes, escape: np.uint8) -> tuple[Integers, Integers]:
    """Rows and columns of all escapes of codes [T, n], by column, then by row. n: whole words."""
    found = np.zeros(codes.shape[1], np.uint32)
    for token in range(len(codes)):
        _count(codes[token], escape, found)
    place = np.zeros(codes.shape[1] + 1, np.int64)
    place[1:] = np.cumsum(found)
    rows, columns = np.empty(place[-1], np.int64), np.empty(place[-1], np.int64)
    pattern = np.uint64(np.uint64(escape) * _ONES)
    words = np.empty(codes.shape[1] // _WORD + 1, np.int64)
    for token in range(len(codes)):
        own = codes[token]
        for i in range(_find(own.view(np.uint64), pattern, words)):
            for column in range(words[i] * _WORD, (words[i] + 1) * _WORD):
                if own[column] == escape:
                    rows[place[column]] = token
                    columns[place[column]] = column
                    place[column] += 1
    return rows, columns


@jit
def _turn(rows: Bytes, columns: Bytes) -> None:
    """[m, n] -> [n, m], by words of `_WORD` bytes. m: a multiple of it."""
    m, n = np.uint64(rows.shape[0]), np.uint64(rows.shape[1])
    word, block = np.uint64(_WORD), np.uint64(_BLOCK)
    words = columns.view(np.uint64)
    for first in range(np.uint64(0), n, block):
        count = min(block, n - first)
        for i in range(np.uint64(0), m // word):
            for j in range(np.uint64(0), count):
                bits = np.uint64(0)
                for k in range(word):
                    byte = np.uint64(rows[i * word + k, first + j])
                    bits |= byte << np.uint64(k * word)
                words[first + j, i] = bits


@jit
def _turn_back(columns: Bytes, rows: Bytes) -> None:
    """Inverse of `_turn`."""
    m, n = np.uint64(rows.shape[0]), np.uint64(rows.shape[1])
    word, block = np.uint64(_WORD), np.uint64(_BLOCK)
    words = columns.view(np.uint64)
    for first in range(np.uint64(0), n, block):
        count = min(block, n - first)
        for i in range(np.uint64(0), m // word):
            for j in range(np.uint64(0), count):
                bits = words[first + j, i]
                for k in range(word):
                    byte = np.uint8(bits >> np.uint64(k * word))
                    rows[i * word + k, first + j] = byte


@jit
def encode_columns(
    coefficients: Floats,
    first: int,
    inverse_step: np.float32,
    dead: Floats,
    offset: Floats,
    width: int,
    packed: Bytes,
    low: Bytes,
    wide: Integers,
) -> tuple[int, int]:
    """Columns first .. first + n - 1 of coefficients [T, live], none beyond the largest level, ->
    packed codes, escapes, wide escapes.

    dead, offset: [n]. packed: out, [n, bytes of a column]. low, wide: out, with room for an escape
    per coefficient; gives how many there are.
    """
    tokens, columns = len(coefficients), len(dead)
    size = packed.shape[1]
    per_byte = 8 // width
    escape = np.int32((1 << width) - 1)
    rows = np.zeros((_whole_words(size), columns), np.uint8)
    codes = np.zeros((tokens, _whole_words(columns)), np.uint8)
    for token in range(tokens):
        row, own = coefficients[token, first : first + columns], codes[token, :columns]
        _row_codes(row, inverse_step, dead, offset, escape, own)
        _add_lane(own, np.uint8(token % per_byte * width), rows[token // per_byte])
    turned = np.empty((columns, len(rows)), np.uint8)
    _turn(rows, turned)
    packed[:] = turned[:, :size]
    wides = 0
    of_token, of_column = _places(codes, np.uint8(escape))
    for i in range(len(of_token)):
        token, column = of_token[i], of_column[i]
        x = coefficients[token, first + column]
        beyond = _code(x, inverse_step, dead[column], offset[column]) - escape
        if beyond >= _WIDE:
            wide[wides] = beyond - _WIDE
            wides += 1
            beyond = np.int32(_WIDE)
        low[i] = beyond
    return len(of_token), wides


@jit
def _escapes_of(byte: np.uint8, width: int) -> np.uint8:
    """Codes in a byte that are escapes."""
    if width == 8:
        return np.uint8(byte == np.uint8(255))
    if width == 4:
        return np.uint8(np.uint8(byte >= np.uint8(0xF0)) + np.uint8((byte & 0xF) == 0xF))
    # A bit where both bits of a code are set.
    both = np.uint8(byte & np.uint8(byte >> np.uint8(1)) & np.uint8(0x55))
    pairs = np.uint8((both & np.uint8(0x11)) + (np.uint8(both >> np.uint8(2)) & np.uint8(0x11)))
    return np.uint8((pairs & np.uint8(0xF)) + np.uint8(pairs >> np.uint8(4)))


@jit
def count_escapes(packed: Bytes, tokens: int, width: int) -> int:
    """Of columns of `tokens` packed codes each."""
    size = (tokens * width + 7) // 8
    per_byte = 8 // width
    found = np.uint32(0)
    for i in range(len(packed)):
        found += np.uint32(_escapes_of(packed[i], width))
    # Less those in the padding of each column, which may be anything.
    padding = size * per_byte - tokens
    unused = 0
    if padding:
        kept = np.uint8((1 << ((per_byte - padding) * width)) - 1)
        for last in range(size - 1, len(packed), size):
            unused += int(_escapes_of(np.uint8(packed[last] & ~kept), width))
    return int(found) - unused


def value_tables(values: Floats, widths: Bytes, step: float) -> Floats:
    """float32 [C, 256]: what every code of a class stands for, 0 for its escape.

    values: [C, M], of the levels from 1 on. widths: [C].
    """
    codes = np.arange(256)
    levels = (codes + 1) >> 1
    listed = values.shape[1]
    sizes = np.where(
        levels <= listed,
        values[:, np.clip(levels, 1, listed) - 1],
        levels.astype(np.float32) * np.float32(step),
    )
    tables = np.where(codes & 1, sizes, -sizes).astype(np.float32)
    escapes = (1 << widths.astype(np.int64)) - 1
    tables[(codes == 0) | (codes >= escapes[:, None])] = 0.0
    return np.ascontiguousarray(tables)


@jit
def _row_values(codes: Bytes, starts: Words64, tables: Floats, out: Floats) -> None:
    """Coefficients of one token. starts: where the tables of columns are."""
    for j in range(len(out)):
        out[j] = tables[starts[j] + np.uint64(codes[j])]


@jit
def decode_columns(
    packed: Bytes,
    low: Bytes,
    wide: Bytes,
    classes: Integers,
    values: Floats,
    tables: Floats,
    step: np.float32,
    width: int,
    first: int,
    coefficients: Floats,
) -> None:
    """Inverse of `encode_columns`: columns first .. first + n - 1 of coefficients, out, [T, live].

    packed: [n, bytes of a column]. low, wide: as many escapes as `packed` and `low` say. classes:
    [n]. values: [C, M], of the levels from 1 on. tables: `value_tables`'.
    """
    tokens, columns, size = len(coefficients), len(classes), packed.shape[1]
    per_byte = 8 // width
    escape = (1 << width) - 1
    listed = values.shape[1]
    rows = np.empty((_whole_words(size), columns), np.uint8)
    turned = np.zeros((columns, len(rows)), np.uint8)
    turned[:, :size] = packed
    _turn_back(turned, rows)
    starts = (classes * tables.shape[1]).astype(np.uint64)
    flat = tables.reshape(-1)
    codes = np.zeros((tokens, _whole_words(columns)), np.uint8)
    for token in range(tokens):
        own, out = codes[token, :columns], coefficients[token, first : first + columns]
        shift = np.uint8(token % per_byte * width)
        _take_lane(rows[token // per_byte], shift, np.uint8(escape), own)
        _row_values(own, starts, flat, out)
    wides = 0
    of_token, of_column = _places(codes, np.uint8(escape))
    for i in range(len(of_token)):
        code = escape + np.int64(low[i])
        if low[i] == _WIDE:
            code += np.int64(wide[2 * wides]) + 256 * np.int64(wide[2 * wides + 1])
            wides += 1
        large = (code + 1) >> 1
        x = np.float32(large) * step
        if large <= listed:
            x = values[classes[of_column[i]], large - 1]
        coefficients[of_token[i], first + of_column[i]] = x if code & 1 else -x
