"""Compiled quantisation, packing and their inverses: a bit plan's payload in one pass each way.

The codes are those of `kvtc_vllm.codec.quantizers`, bit for bit from the same coefficients; the
layout is that of `kvtc_vllm.codec.payload`. Importing this imports numba.
"""

from __future__ import annotations

import numpy as np

from kvtc_vllm.codec.cpu.jit import jit
from kvtc_vllm.codec.cpu.rounding import clamped, e4m3_bits, fp16_bits, fp16_value
from kvtc_vllm.codec.cpu.rows import Bytes, Floats, Integers, largest_bits

_ZERO = np.float32(0.0)
_HALF = np.float32(0.5)
_ROUNDER = np.float32(12582912.0)
_E4M3_MAX = np.float32(448.0)
_FP8 = 8
"""Bits of the one type that is not uniform."""


@jit
def _range(x: Floats) -> tuple[np.float32, np.float32]:
    """Least and greatest of 16 lanes at a time: a plain loop over floats does not vectorise."""
    low, high = x[0], x[0]
    whole = len(x) // 16 * 16
    if whole:
        lows, highs = x[:16].copy(), x[:16].copy()
        for start in range(16, whole, 16):
            lanes = x[start : start + 16]
            for i in range(16):
                lows[i] = lanes[i] if lanes[i] < lows[i] else lows[i]
                highs[i] = lanes[i] if lanes[i] > highs[i] else highs[i]
        for i in range(16):
            low = lows[i] if lows[i] < low else low
            high = highs[i] if highs[i] > high else high
    for i in range(whole, len(x)):
        low = x[i] if x[i] < low else low
        high = x[i] if x[i] > high else high
    return low, high


@jit
def _quantise(x: Floats, bits: int, codes: Bytes) -> tuple[np.uint16, np.uint16]:
    """One coefficient group of one token; gives shift and scale as float16 bits."""
    low, high = _range(x)
    top = np.float32((1 << bits) - 1)
    if bits == _FP8:
        shift = fp16_bits(low * _HALF + high * _HALF)
        centre = fp16_value(shift)
        step = max(high - centre, centre - low) / _E4M3_MAX
    else:
        shift = fp16_bits(low)
        centre = fp16_value(shift)
        step = max(high - centre, _ZERO) / top
    scale = fp16_bits(step) if high > low else np.uint16(0)
    divisor = fp16_value(scale)
    if divisor == 0:
        codes[: len(x)] = 0
    elif bits == _FP8:
        for i in range(len(x)):
            y = clamped((x[i] - centre) / divisor, -_E4M3_MAX, _E4M3_MAX)
            # Adding zero turns -0 into code 0.
            codes[i] = e4m3_bits(y + _ZERO)
    else:
        for i in range(len(x)):
            y = clamped((x[i] - centre) / divisor, _ZERO, top)
            codes[i] = np.uint8((y + _ROUNDER) - _ROUNDER)
    return shift, scale


@jit
def _pack(codes: Bytes, bits: int, first: int, out: Bytes) -> None:
    """Codes as elements first, first + 1, .. of packed codes that were zero."""
    per_byte = 8 // bits
    if first % per_byte or len(codes) % per_byte:
        for i in range(len(codes)):
            element = first + i
            out[element // per_byte] |= codes[i] << np.uint8(element % per_byte * bits)
        return
    target = out[first // per_byte : (first + len(codes)) // per_byte]
    if bits == 8:
        target[:] = codes
    elif bits == 4:
        for i in range(len(target)):
            target[i] = codes[2 * i] | (codes[2 * i + 1] << 4)
    else:
        for i in range(len(target)):
            low = codes[4 * i] | (codes[4 * i + 1] << 2)
            target[i] = low | (codes[4 * i + 2] << 4) | (codes[4 * i + 3] << 6)


@jit
def _unpack(data: Bytes, bits: int, first: int, codes: Bytes) -> None:
    """Inverse of `_pack`."""
    per_byte = 8 // bits
    mask = np.uint8((1 << bits) - 1)
    if first % per_byte or len(codes) % per_byte:
        for i in range(len(codes)):
            element = first + i
            codes[i] = (data[element // per_byte] >> np.uint8(element % per_byte * bits)) & mask
        return
    source = data[first // per_byte : (first + len(codes)) // per_byte]
    if bits == 8:
        codes[:] = source
    elif bits == 4:
        for i in range(len(source)):
            codes[2 * i] = source[i] & mask
            codes[2 * i + 1] = source[i] >> 4
    else:
        for i in range(len(source)):
            codes[4 * i] = source[i] & mask
            codes[4 * i + 1] = (source[i] >> 2) & mask
            codes[4 * i + 2] = (source[i] >> 4) & mask
            codes[4 * i + 3] = source[i] >> 6


@jit
def encode_groups(coefficients: Floats, groups: Integers, payload: Bytes) -> None:
    """Coefficients [T, rank] -> payload, zeros before.

    groups: [n, 3] in stored order: first column, size, bits.
    """
    tokens, plane = len(coefficients), len(groups) * len(coefficients)
    at = 4 * plane
    scratch = np.empty(max(1, coefficients.shape[1]), np.uint8)
    for g in range(len(groups)):
        first, size, bits = groups[g]
        codes = scratch[:size]
        packed = (tokens * size * bits + 7) // 8
        out = payload[at : at + packed]
        at += packed
        for token in range(tokens):
            x = coefficients[token, first : first + size]
            shift, scale = _quantise(x, bits, codes)
            place = g * tokens + token
            payload[place] = shift >> 8
            payload[plane + place] = scale >> 8
            payload[2 * plane + place] = shift & 0xFF
            payload[3 * plane + place] = scale & 0xFF
            _pack(codes, bits, token * size, out)


@jit
def decode_groups(payload: Bytes, groups: Integers, values: Floats, coefficients: Floats) -> None:
    """Inverse of `encode_groups`; columns of no group are left as they are.

    values: the 256 numbers of E4M3.
    """
    tokens, plane = len(coefficients), len(groups) * len(coefficients)
    at = 4 * plane
    scratch = np.empty(max(1, coefficients.shape[1]), np.uint8)
    for g in range(len(groups)):
        first, size, bits = groups[g]
        codes = scratch[:size]
        packed = (tokens * size * bits + 7) // 8
        data = payload[at : at + packed]
        at += packed
        for token in range(tokens):
            place = g * tokens + token
            high, low = np.uint16(payload[place]), np.uint16(payload[2 * plane + place])
            shift = fp16_value(np.uint16((high << 8) | low))
            high = np.uint16(payload[plane + place])
            low = np.uint16(payload[3 * plane + place])
            scale = fp16_value(np.uint16((high << 8) | low))
            _unpack(data, bits, token * size, codes)
            out = coefficients[token, first : first + size]
            if bits == _FP8:
                for i in range(size):
                    out[i] = values[codes[i]] * scale + shift
            else:
                for i in range(size):
                    out[i] = np.float32(codes[i]) * scale + shift


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
