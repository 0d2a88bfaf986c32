"""Compiled quantisation, packing and their inverses for step plans, one width per call.

Codes and bytes are those of `kvtc_vllm.codec.v2`, bit for bit from the same coefficients. Columns
are taken in blocks of `BLOCK`, which lie in one cache line of a row. Importing this imports numba.
"""

from __future__ import annotations

import numpy as np

from kvtc_vllm.codec.cpu.jit import jit
from kvtc_vllm.codec.cpu.rows import Bytes, Floats, Integers

BLOCK = 16
_WIDE = 255


@jit
def encode_columns(
    coefficients: Floats,
    columns: Integers,
    inverse_step: np.float32,
    dead: Floats,
    offset: Floats,
    width: int,
    packed: Bytes,
    low: Bytes,
    wide: Integers,
) -> tuple[int, int]:
    """Coefficients [T, r], none beyond the largest level, -> packed codes, escapes, wide escapes.

    columns: those of this width. dead, offset: [r]. packed, low, wide: out, with room for an escape
    per coefficient; gives how many there are.
    """
    tokens = len(coefficients)
    size = (tokens * width + 7) // 8
    per_byte = 8 // width
    escape = (1 << width) - 1
    codes = np.empty((tokens, BLOCK), np.int32)
    lows = wides = 0
    for first in range(0, len(columns), BLOCK):
        count = min(BLOCK, len(columns) - first)
        for token in range(tokens):
            row = coefficients[token]
            for j in range(count):
                c = columns[first + j]
                x = row[c]
                scaled = np.float32(abs(x) * inverse_step)
                level = np.int32(np.float32(scaled + offset[c]))
                level = np.int32(0) if scaled < dead[c] else level
                positive = np.int32(1) if x > 0 else np.int32(0)
                codes[token, j] = max(np.int32(2 * level - positive), np.int32(0))
        for j in range(count):
            for i in range(size):
                byte = np.int32(0)
                start = i * per_byte
                for lane in range(min(per_byte, tokens - start)):
                    code = codes[start + lane, j]
                    if code >= escape:
                        beyond = code - escape
                        if beyond >= _WIDE:
                            wide[wides] = beyond - _WIDE
                            wides += 1
                            beyond = _WIDE
                        low[lows] = beyond
                        lows += 1
                        code = escape
                    byte |= code << np.int32(lane * width)
                packed[(first + j) * size + i] = byte
    return lows, wides


@jit
def count_escapes(packed: Bytes, tokens: int, width: int) -> int:
    """Of columns of `tokens` packed codes each."""
    size = (tokens * width + 7) // 8
    per_byte = 8 // width
    escape = (1 << width) - 1
    in_byte = np.zeros(256, np.int64)
    for byte in range(256):
        for lane in range(per_byte):
            in_byte[byte] += ((byte >> (lane * width)) & escape) == escape
    # Of the last byte of a column, whose padding may be anything.
    used = (1 << ((tokens - (size - 1) * per_byte) * width)) - 1
    found = 0
    for start in range(0, len(packed), size):
        for i in range(size - 1):
            found += in_byte[packed[start + i]]
        found += in_byte[packed[start + size - 1] & used]
    return found


@jit
def decode_columns(
    packed: Bytes,
    low: Bytes,
    wide: Bytes,
    columns: Integers,
    classes: Integers,
    values: Floats,
    step: np.float32,
    width: int,
    coefficients: Floats,
) -> None:
    """Inverse of `encode_columns`: columns of coefficients, out, [T, r].

    low, wide: as many escapes as `packed` and `low` say. classes: [r]. values: [C, M], of the
    levels from 1 on.
    """
    tokens = len(coefficients)
    size = (tokens * width + 7) // 8
    per_byte = 8 // width
    escape = (1 << width) - 1
    listed = values.shape[1]
    block = np.empty((BLOCK, tokens), np.float32)
    table = np.empty(1 << width, np.float32)
    lows = wides = 0
    for first in range(0, len(columns), BLOCK):
        count = min(BLOCK, len(columns) - first)
        for j in range(count):
            own = values[classes[columns[first + j]]]
            table[0] = 0.0
            for code in range(1, escape):
                level = (code + 1) >> 1
                x = own[level - 1] if level <= listed else np.float32(level) * step
                table[code] = x if code & 1 else -x
            source = packed[(first + j) * size : (first + j + 1) * size]
            for i in range(size):
                byte = np.int64(source[i])
                start = i * per_byte
                for token in range(start, min(start + per_byte, tokens)):
                    code = byte & escape
                    byte >>= width
                    if code < escape:
                        block[j, token] = table[code]
                        continue
                    code += low[lows]
                    if low[lows] == _WIDE:
                        code += np.int64(wide[2 * wides]) + 256 * np.int64(wide[2 * wides + 1])
                        wides += 1
                    lows += 1
                    level = (code + 1) >> 1
                    x = own[level - 1] if level <= listed else np.float32(level) * step
                    block[j, token] = x if code & 1 else -x
        for token in range(tokens):
            row = coefficients[token]
            for j in range(count):
                row[columns[first + j]] = block[j, token]
