"""Compiled quantisation, packing and their inverses: a bit plan's payload in one pass each way.

The codes are those of `kvtc_vllm.codec.quantizers`, bit for bit from the same coefficients; the
layout is that of `kvtc_vllm.codec.payload`. Importing this imports numba.
"""

from __future__ import annotations

import numpy as np

from kvtc_vllm.codec.cpu.bits import bits_of, float_of
from kvtc_vllm.codec.cpu.jit import jit
from kvtc_vllm.codec.cpu.rows import Bytes, Floats, Integers

_ZERO = np.float32(0.0)
_HALF = np.float32(0.5)
_ROUNDER = np.float32(12582912.0)
_E4M3_MAX = np.float32(448.0)
_FP8 = 8
"""Bits of the one type that is not uniform."""
_FP16_MAX = np.float32(65504.0)
_FP16_NORMAL = np.uint32(0x38800000)
_FP16_REBIAS = np.uint32((112 << 23) - 0xFFF)
_FP32_HALF = np.uint32(126 << 23)
_FP32_REST = np.uint32(0x7FFFFFFF)
_FP32_SIGN = np.uint32(0x80000000)
_FP32_INFINITY = np.uint32(0x7F800000)
_E4M3_NORMAL = np.uint32(121 << 23)
_E4M3_REBIAS = np.uint32((120 << 23) - 0x7FFFF)
# Of this size float32 has the ulp of the least E4M3 number.
_E4M3_ULP = np.float32(2.0**14)
_E4M3_ULP_BITS = np.uint32(141 << 23)


@jit
def _clamped(x: np.float32, low: np.float32, high: np.float32) -> np.float32:
    """x between low and high."""
    x = low if x < low else x
    return high if x > high else x


@jit
def _fp16_bits(x: np.float32) -> np.uint16:
    """x clamped to the float16 range, then rounded."""
    bits = bits_of(_clamped(x, -_FP16_MAX, _FP16_MAX))
    size = np.uint32(bits & _FP32_REST)
    if size >= _FP16_NORMAL:
        odd = np.uint32(np.uint32(size >> 13) & 1)
        half = np.uint32(np.uint32(size - _FP16_REBIAS + odd) >> 13)
    else:
        # The sum has the ulp of the least float16.
        half = np.uint32(bits_of(float_of(size) + np.float32(0.5)) - _FP32_HALF)
    return np.uint16(half | np.uint32(np.uint32(bits & _FP32_SIGN) >> 16))


@jit
def _fp16_value(bits: np.uint16) -> np.float32:
    """The float32 of a float16, infinities and NaN included."""
    size = np.uint32(bits & np.uint16(0x7FFF))
    if size >= np.uint32(0x7C00):
        x = float_of(np.uint32(size << 13) | _FP32_INFINITY)
    elif size >= np.uint32(0x400):
        x = float_of(np.uint32(size << 13) + np.uint32(112 << 23))
    else:
        x = np.float32(size) * np.float32(2.0**-24)
    return -x if bits & np.uint16(0x8000) else x


@jit
def _e4m3_bits(x: np.float32) -> np.uint8:
    """Of x within +-448."""
    bits = bits_of(x)
    size = np.uint32(bits & _FP32_REST)
    odd = np.uint32(np.uint32(size >> 20) & 1)
    normal = np.uint32(np.uint32(size - _E4M3_REBIAS + odd) >> 20)
    tiny = np.uint32(bits_of(float_of(size) + _E4M3_ULP) - _E4M3_ULP_BITS)
    code = normal if size >= _E4M3_NORMAL else tiny
    return np.uint8(code | np.uint32(np.uint32(bits & _FP32_SIGN) >> 24))


@jit
def _ordered(bits: np.int32) -> np.int32:
    """Bits of a float32 as an integer that is larger for larger floats; its own inverse."""
    return np.int32(bits ^ np.int32(np.int32(bits >> 31) & np.int32(0x7FFFFFFF)))


@jit
def _range(x: Floats) -> tuple[np.float32, np.float32]:
    """Least and greatest element, as integers because those vectorise."""
    bits = x.view(np.int32)
    low = high = _ordered(bits[0])
    for i in range(len(bits)):
        element = _ordered(bits[i])
        low, high = min(low, element), max(high, element)
    return float_of(np.uint32(_ordered(low))), float_of(np.uint32(_ordered(high)))


@jit
def _quantise(x: Floats, bits: int, codes: Bytes) -> tuple[np.uint16, np.uint16]:
    """One coefficient group of one token; gives shift and scale as float16 bits."""
    low, high = _range(x)
    top = np.float32((1 << bits) - 1)
    if bits == _FP8:
        shift = _fp16_bits(low * _HALF + high * _HALF)
        centre = _fp16_value(shift)
        step = max(high - centre, centre - low) / _E4M3_MAX
    else:
        shift = _fp16_bits(low)
        centre = _fp16_value(shift)
        step = max(high - centre, _ZERO) / top
    scale = _fp16_bits(step) if high > low else np.uint16(0)
    divisor = _fp16_value(scale)
    if divisor == 0:
        codes[: len(x)] = 0
    elif bits == _FP8:
        for i in range(len(x)):
            y = _clamped((x[i] - centre) / divisor, -_E4M3_MAX, _E4M3_MAX)
            # Adding zero turns -0 into code 0.
            codes[i] = _e4m3_bits(y + _ZERO)
    else:
        for i in range(len(x)):
            y = _clamped((x[i] - centre) / divisor, _ZERO, top)
            codes[i] = np.uint8(bits_of(y + _ROUNDER))
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
            shift = _fp16_value(np.uint16((high << 8) | low))
            high = np.uint16(payload[plane + place])
            low = np.uint16(payload[3 * plane + place])
            scale = _fp16_value(np.uint16((high << 8) | low))
            _unpack(data, bits, token * size, codes)
            out = coefficients[token, first : first + size]
            if bits == _FP8:
                for i in range(size):
                    out[i] = values[codes[i]] * scale + shift
            else:
                for i in range(size):
                    out[i] = np.float32(codes[i]) * scale + shift
