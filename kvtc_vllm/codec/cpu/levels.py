"""Compiled quantisation, packing and their inverses for step plans, one width per call.

Codes and bytes are those of `kvtc_vllm.codec.v2`, bit for bit from the same coefficients. Columns
are taken in blocks of `BLOCK`, which lie in one cache line of a row. Importing this imports numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtc_vllm.codec.cpu.jit import jit
from kvtc_vllm.codec.cpu.rows import Bytes, Floats, Integers

BLOCK = 16
_WIDE = 255


@jit
def _block_codes(
    coefficients: Floats,
    inverse_step: np.float32,
    dead: Floats,
    offset: Floats,
    codes: npt.NDArray[np.int32],
) -> None:
    """Codes [T, n] of coefficients [T, n]; without branches, so that it vectorises."""
    for token in range(len(coefficients)):
        row, out = coefficients[token], codes[token]
        for j in range(len(row)):
            x = row[j]
            scaled = abs(x) * inverse_step
            level = np.int32(scaled + offset[j])
            level = np.int32(0) if scaled < dead[j] else level
            positive = np.int32(1) if x > np.float32(0.0) else np.int32(0)
            out[j] = max(np.int32(level + level - positive), np.int32(0))


@jit
def encode_columns(
    coefficients: Floats,
    inverse_step: np.float32,
    dead: Floats,
    offset: Floats,
    width: int,
    packed: Bytes,
    low: Bytes,
    wide: Integers,
) -> tuple[int, int]:
    """Coefficients [T, n], none beyond the largest level, -> packed codes, escapes, wide escapes.

    dead, offset: [n]. packed, low, wide: out, with room for an escape per coefficient; gives how
    many there are.
    """
    tokens, columns = coefficients.shape
    size = (tokens * width + 7) // 8
    per_byte = 8 // width
    escape = np.int32((1 << width) - 1)
    codes = np.empty((tokens, BLOCK), np.int32)
    byte = np.empty(BLOCK, np.int32)
    lows = wides = 0
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        count = last - first
        own = codes[:, :count]
        _block_codes(
            coefficients[:, first:last], inverse_step, dead[first:last], offset[first:last], own
        )
        for i in range(size):
            byte[:] = 0
            for lane in range(min(per_byte, tokens - i * per_byte)):
                row = own[i * per_byte + lane]
                shift = np.int32(lane * width)
                for j in range(count):
                    byte[j] |= min(row[j], escape) << shift
            for j in range(count):
                packed[(first + j) * size + i] = byte[j]
        for j in range(count):
            for token in range(tokens):
                beyond = own[token, j] - escape
                if beyond >= 0:
                    if beyond >= _WIDE:
                        wide[wides] = beyond - _WIDE
                        wides += 1
                        beyond = np.int32(_WIDE)
                    low[lows] = beyond
                    lows += 1
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
    classes: Integers,
    values: Floats,
    step: np.float32,
    width: int,
    coefficients: Floats,
) -> None:
    """Inverse of `encode_columns`: coefficients, out, [T, n].

    low, wide: as many escapes as `packed` and `low` say. classes: [n]. values: [C, M], of the
    levels from 1 on.
    """
    tokens, columns = coefficients.shape
    size = (tokens * width + 7) // 8
    per_byte = 8 // width
    escape = (1 << width) - 1
    listed = values.shape[1]
    block = np.empty((BLOCK, tokens), np.float32)
    table = np.empty(1 << width, np.float32)
    lows = wides = 0
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        for j in range(last - first):
            own = values[classes[first + j]]
            table[0] = 0.0
            for entry in range(1, escape):
                level = (entry + 1) >> 1
                x = own[level - 1] if level <= listed else np.float32(level) * step
                table[entry] = x if entry & 1 else -x
            source = packed[(first + j) * size : (first + j + 1) * size]
            for i in range(size):
                byte = np.int64(source[i])
                start = i * per_byte
                for token in range(start, min(start + per_byte, tokens)):
                    code = int(byte & escape)
                    byte >>= width
                    if code < escape:
                        block[j, token] = table[code]
                        continue
                    code += low[lows]
                    if low[lows] == _WIDE:
                        code += np.int64(wide[2 * wides]) + 256 * np.int64(wide[2 * wides + 1])
                        wides += 1
                    lows += 1
                    large = (code + 1) >> 1
                    y = own[large - 1] if large <= listed else np.float32(large) * step
                    block[j, token] = y if code & 1 else -y
        for token in range(tokens):
            row = coefficients[token, first:last]
            for j in range(len(row)):
                row[j] = block[j, token]
