"""Conversions between float types as bit patterns, compiled: numba has no float16 or fp8 on a CPU.

Bit patterns are of IEEE 754 and OCP E4M3; all roundings are to nearest even. Loops hold float32
rows as uint32 and view them as either, because integers vectorise where NaN forbids it to floats.
"""

from __future__ import annotations

import numpy as np

from kvtc_vllm.codec.cpu.jit import jit

FLOAT32_SIGN = np.uint32(0x80000000)
FLOAT32_REST = np.uint32(0x7FFFFFFF)
FLOAT32_INFINITY = np.uint32(0x7F800000)
BFLOAT16_NAN = np.uint32(0x7FC0)
FP16_MAX = np.float32(65504.0)
E4M3_MAX = np.float32(448.0)
ROUNDER = np.float32(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds float32 below 2^22 to an integer."""
_FP16_NORMAL = np.uint32(0x38800000)
_FP16_REBIAS = np.uint32((112 << 23) - 0xFFF)
_FP32_HALF = np.uint32(126 << 23)
_E4M3_NORMAL = np.uint32(121 << 23)
_E4M3_REBIAS = np.uint32((120 << 23) - 0x7FFFF)
# Of this size float32 has the ulp of the least E4M3 number.
_E4M3_ULP = np.float32(2.0**14)
_E4M3_ULP_BITS = np.uint32(141 << 23)


@jit
def bits_of(x: np.float32) -> np.uint32:
    """The bits of a float32."""
    return np.float32(x).view(np.uint32)


@jit
def float_of(bits: np.uint32) -> np.float32:
    """The float32 with these bits."""
    return np.uint32(bits).view(np.float32)


@jit
def clamped(x: np.float32, low: np.float32, high: np.float32) -> np.float32:
    """x between low and high."""
    x = low if x < low else x
    return high if x > high else x


@jit
def fp16_bits(x: np.float32) -> np.uint16:
    """x clamped to the float16 range, then rounded."""
    bits = bits_of(clamped(x, -FP16_MAX, FP16_MAX))
    size = np.uint32(bits & FLOAT32_REST)
    if size >= _FP16_NORMAL:
        odd = np.uint32(np.uint32(size >> 13) & 1)
        half = np.uint32(np.uint32(size - _FP16_REBIAS + odd) >> 13)
    else:
        # The sum has the ulp of the least float16.
        half = np.uint32(bits_of(float_of(size) + np.float32(0.5)) - _FP32_HALF)
    return np.uint16(half | np.uint32(np.uint32(bits & FLOAT32_SIGN) >> 16))


@jit
def fp16_value(bits: np.uint16) -> np.float32:
    """The float32 of a float16, infinities and NaN included."""
    size = np.uint32(bits & np.uint16(0x7FFF))
    if size >= np.uint32(0x7C00):
        x = float_of(np.uint32(size << 13) | FLOAT32_INFINITY)
    elif size >= np.uint32(0x400):
        x = float_of(np.uint32(size << 13) + np.uint32(112 << 23))
    else:
        x = np.float32(size) * np.float32(2.0**-24)
    return -x if bits & np.uint16(0x8000) else x


@jit
def e4m3_bits(x: np.float32) -> np.uint8:
    """Of x within +-448."""
    bits = bits_of(x)
    size = np.uint32(bits & FLOAT32_REST)
    odd = np.uint32(np.uint32(size >> 20) & 1)
    normal = np.uint32(np.uint32(size - _E4M3_REBIAS + odd) >> 20)
    tiny = np.uint32(bits_of(float_of(size) + _E4M3_ULP) - _E4M3_ULP_BITS)
    code = normal if size >= _E4M3_NORMAL else tiny
    return np.uint8(code | np.uint32(np.uint32(bits & FLOAT32_SIGN) >> 24))


@jit
def bfloat16_bits(bits: np.uint32) -> np.uint32:
    """Of the float32 with these bits."""
    odd = np.uint32(np.uint32(bits >> 16) & 1)
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> 16)
    return BFLOAT16_NAN if np.uint32(bits & FLOAT32_REST) > FLOAT32_INFINITY else rounded
