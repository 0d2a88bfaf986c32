"""Compiled passes over rows: cache elements -> centred rows, and products -> cache elements.

Every pass holds one row of float32 at a time, which stays in the cache of a core. Rows are [T, p];
their parts are K, V, or both one after the other, each of layers * heads * size columns. Importing
this imports numba.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvtc_vllm.codec.cpu.bits import bits_of, float_of
from kvtc_vllm.codec.cpu.jit import jit

Elements = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
"""bfloat16 as uint16, or float32 as uint32."""
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


class Part(NamedTuple):
    """K or V in the rows of one section.

    elements: [T, all layers]; those of the section start at `offset` of each token.
    first, end: columns of the rows. head_size: elements per head.
    angles: [ropes, T, 2, most halves], what turns keys, or what turns them back.
    rope_of_layer, halves, neox: see `Rotation`.
    """

    elements: Elements
    offset: int
    first: int
    end: int
    head_size: int
    angles: Floats
    rope_of_layer: Integers
    halves: Integers
    neox: Integers


ZERO_POINT = 128
_STEPS = np.float32(127.0)
_LEAST_TOP = np.float32(1e-30)
_ROUNDER = np.float32(12582912.0)
"""1.5 * 2^23: adding it rounds a float32 below 2^22; the low bits of the sum are the integer."""
_REST = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_BFLOAT16_NAN = np.uint32(0x7FC0)


@jit
def largest_bits16(x: npt.NDArray[np.uint16]) -> int:
    """Largest magnitude of 16-bit floats [n], as bits without the sign: infinity, NaN last."""
    largest = np.uint16(0)
    for i in range(len(x)):
        largest = max(largest, np.uint16(x[i] & np.uint16(0x7FFF)))
    return int(largest)


@jit
def largest_bits(row: Words) -> np.uint32:
    """The same of float32 [n]."""
    largest = np.uint32(0)
    for i in range(len(row)):
        largest = max(largest, np.uint32(row[i] & _REST))
    return largest


@jit
def _bfloat16_bits(bits: np.uint32) -> np.uint32:
    """The float32 with these bits as bfloat16, to nearest even."""
    odd = np.uint32(np.uint32(bits >> 16) & 1)
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> 16)
    return _BFLOAT16_NAN if np.uint32(bits & _REST) > _INFINITY else rounded


@jit
def _rotate_row(row: Floats, token: int, part: Part) -> None:
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) of all keys of a token, in place.

    row: the columns of the part. A layer without rope (-1) stays. Indices are unsigned: numba then
    knows that none counts from the end, and the loops vectorise.
    """
    layer_size = len(row) // max(1, len(part.rope_of_layer))
    for layer in range(len(part.rope_of_layer)):
        rope = part.rope_of_layer[layer]
        if rope < 0:
            continue
        half = np.uint64(part.halves[rope])
        cos, sin = part.angles[rope, token, 0], part.angles[rope, token, 1]
        for start in range(layer * layer_size, (layer + 1) * layer_size, part.head_size):
            first = np.uint64(start)
            if part.neox[rope]:
                second = first + half
                for i in range(half):
                    x1, x2 = row[first + i], row[second + i]
                    row[first + i] = x1 * cos[i] - x2 * sin[i]
                    row[second + i] = x2 * cos[i] + x1 * sin[i]
            else:
                for i in range(half):
                    at = first + i + i
                    x1, x2 = row[at], row[at + np.uint64(1)]
                    row[at] = x1 * cos[i] - x2 * sin[i]
                    row[at + np.uint64(1)] = x2 * cos[i] + x1 * sin[i]


@jit
def _row_to_int8(row: Floats, token: int, codes: Bytes, factors: Floats) -> None:
    top = float_of(largest_bits(row.view(np.uint32)))
    # A row of nothing, or of what is nothing beside any mean: the steps are all 0.
    inverse = np.float32(0.0)
    factors[token] = 1.0
    if top > _LEAST_TOP:
        inverse = _STEPS / top
        factors[token] = top / _STEPS
    own = codes[token]
    for i in range(len(row)):
        own[i] = np.uint8(bits_of(row[i] * inverse + _ROUNDER) + np.uint32(ZERO_POINT))


@jit
def to_int8(rows: Floats, first: int, codes: Bytes, factors: Floats) -> None:
    """Rows [T, n] from column `first` on as steps of int8 plus `ZERO_POINT`.

    codes: out, [T, n - first]. factors: out, [T], the value of a step.
    """
    for token in range(len(rows)):
        _row_to_int8(rows[token, first:], token, codes, factors)


@jit
def centre(
    parts: tuple[Part, ...],
    mean: Floats,
    weights: Floats,
    rows: Floats,
    codes: Bytes,
    factors: Floats,
) -> None:
    """Weighted rows of one section without rotation and mean, as float32 or `to_int8`'s.

    parts: together all p columns. weights: [p], or without any: 1 each. rows: out, [T, p]; without
    any, codes and factors: out, of p columns.
    """
    p = len(mean)
    scratch = np.empty(p, np.float32)
    for token in range(len(factors)):
        row = rows[token] if len(rows) else scratch
        for part in parts:
            shift = np.uint32(16 if part.elements.itemsize == 2 else 0)
            own = row[part.first : part.end]
            words = own.view(np.uint32)
            source = part.elements[token, part.offset : part.offset + len(own)]
            for i in range(len(own)):
                words[i] = np.uint32(source[i]) << shift
            _rotate_row(own, token, part)
        for i in range(p):
            row[i] -= mean[i]
        for i in range(len(weights)):
            row[i] *= weights[i]
        if not len(rows):
            _row_to_int8(row, token, codes, factors)


@jit
def scale_rows(rows: Floats, factors: Floats) -> np.uint32:
    """Multiply rows [T, n] by factors [T] in place; gives the largest magnitude, as bits."""
    largest = np.uint32(0)
    for token in range(len(rows)):
        row, factor = rows[token], factors[token]
        for i in range(len(row)):
            row[i] *= factor
        largest = max(largest, largest_bits(row.view(np.uint32)))
    return largest


@jit
def uncentre(rows: Floats, factors: Floats, mean: Floats, parts: tuple[Part, ...]) -> None:
    """Inverse of `centre` for rows [T, p] times factors [T]; rows are overwritten."""
    p = len(mean)
    for token in range(len(rows)):
        row = rows[token]
        factor = factors[token]
        for i in range(p):
            row[i] = row[i] * factor + mean[i]
        for part in parts:
            own = row[part.first : part.end]
            _rotate_row(own, token, part)
            words = own.view(np.uint32)
            out = part.elements[token, part.offset : part.offset + len(own)]
            if part.elements.itemsize == 2:
                for i in range(len(own)):
                    out[i] = _bfloat16_bits(words[i])
            else:
                for i in range(len(own)):
                    out[i] = words[i]
