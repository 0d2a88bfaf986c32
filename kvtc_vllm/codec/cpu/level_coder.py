"""An adaptive binary range coder for levels, given those of tokens that are alike. Imports numba.

Every level is coded as its difference from the level that the same coefficient of the source token
has, turned so that the source's is positive; without a source token as it is. A difference is a
flag for zero, a sign and a magnitude in unary, the largest in Exp-Golomb. Probabilities depend on
the coefficient's class and on how large the source's level is; neighbours tell nothing beyond that.
They are means of a fast and a slow estimate, in integers: both directions compute the same.

Source: the range coder of LZMA (carry by counting); two rates as in video coders.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtc_vllm.codec.cpu.jit import jit
from kvtc_vllm.codec.cpu.packed_levels import Levels
from kvtc_vllm.codec.cpu.rows import Bytes, Integers

NO_SOURCE = -(1 << 30)
"""In the place of a source's level: the token has none."""
_ONE = 1 << 15
_HALF = 1 << 14
_FAST, _SLOW = 5, 7
_UNARY = 14
"""Magnitudes from which on the rest is in Exp-Golomb."""
_KINDS = 4
"""Of sources: none, zero, one, more."""
_CONTEXTS = 2 * _KINDS + _UNARY
"""Of a class: flags for zero and signs by kind of source, bits of the magnitude."""
_BITS = 17
"""Of a prefix in Exp-Golomb, at most: levels are of 16 bits and a sign."""
_LOW, _RANGE, _CACHE, _PENDING, _AT = range(5)
_TOP = 1 << 24
_MASK = (1 << 32) - 1

Model = npt.NDArray[np.int64]
State = npt.NDArray[np.int64]


def new_model(classes: int) -> Model:
    """Estimates before anything was coded: int64 [contexts, 2]."""
    return np.full((classes * _CONTEXTS, 2), _HALF, np.int64)


@jit
def _shift_low(state: State, out: Bytes) -> None:
    low = state[_LOW]
    if low < 0xFF000000 or low > _MASK:
        carry = low >> 32
        byte = state[_CACHE]
        while state[_PENDING] > 0:
            out[state[_AT]] = (byte + carry) & 0xFF
            state[_AT] += 1
            byte = 0xFF
            state[_PENDING] -= 1
        state[_CACHE] = (low >> 24) & 0xFF
    state[_PENDING] += 1
    state[_LOW] = (low & 0x00FFFFFF) << 8


@jit
def _put(state: State, out: Bytes, model: Model, context: int, bit: int) -> None:
    fast, slow = model[context, 0], model[context, 1]
    bound = (state[_RANGE] >> 15) * ((fast + slow) >> 1)
    if bit == 0:
        state[_RANGE] = bound
        model[context, 0] = fast + ((_ONE - fast) >> _FAST)
        model[context, 1] = slow + ((_ONE - slow) >> _SLOW)
    else:
        state[_LOW] += bound
        state[_RANGE] -= bound
        model[context, 0] = fast - (fast >> _FAST)
        model[context, 1] = slow - (slow >> _SLOW)
    while state[_RANGE] < _TOP:
        state[_RANGE] <<= 8
        _shift_low(state, out)


@jit
def _put_plain(state: State, out: Bytes, value: int, bits: int) -> None:
    for i in range(bits - 1, -1, -1):
        state[_RANGE] >>= 1
        if (value >> i) & 1:
            state[_LOW] += state[_RANGE]
        while state[_RANGE] < _TOP:
            state[_RANGE] <<= 8
            _shift_low(state, out)


@jit
def _next_byte(data: Bytes, at: int) -> int:
    return int(data[at]) if at < len(data) else 0


@jit
def _get(
    low: int, span: int, at: int, data: Bytes, model: Model, context: int
) -> tuple[int, int, int, int]:
    """A bit, and the state behind it. The state is not in an array: registers are much faster."""
    fast, slow = model[context, 0], model[context, 1]
    bound = (span >> 15) * ((fast + slow) >> 1)
    if low < bound:
        span = bound
        model[context, 0] = fast + ((_ONE - fast) >> _FAST)
        model[context, 1] = slow + ((_ONE - slow) >> _SLOW)
        bit = 0
    else:
        low -= bound
        span -= bound
        model[context, 0] = fast - (fast >> _FAST)
        model[context, 1] = slow - (slow >> _SLOW)
        bit = 1
    while span < _TOP:
        span <<= 8
        low = (low << 8) | _next_byte(data, at)
        at += 1
    return bit, low, span, at


@jit
def _get_plain(low: int, span: int, at: int, data: Bytes, bits: int) -> tuple[int, int, int, int]:
    """A number of so many bits, and the state behind it."""
    value = 0
    for _ in range(bits):
        span >>= 1
        bit = 0
        if low >= span:
            low -= span
            bit = 1
        value = 2 * value + bit
        while span < _TOP:
            span <<= 8
            low = (low << 8) | _next_byte(data, at)
            at += 1
    return value, low, span, at


@jit
def room_of_column(tokens: int) -> int:
    """Bytes that levels of so many tokens can take at most, however unlikely each of their bits."""
    return 24 * tokens + 64


@jit
def _kind(source: int) -> int:
    if source == NO_SOURCE:
        return 0
    return 1 + min(abs(source), 2)


@jit
def put_levels(levels: Levels, sources: Levels, classes: Integers, model: Model, out: Bytes) -> int:
    """Levels int32 [n, T], sources alike, -> bytes written to `out`; -1 if there is no room.

    classes: [n]. model: `new_model`, changed. out: as many bytes as may be taken, and
    `room_of_column` more.
    """
    columns, tokens = levels.shape
    state = np.zeros(5, np.int64)
    state[_RANGE] = _MASK
    state[_PENDING] = 1
    for column in range(columns):
        own = int(classes[column]) * _CONTEXTS
        if state[_AT] + state[_PENDING] > len(out) - room_of_column(tokens):
            return -1
        for token in range(tokens):
            source = int(sources[column, token])
            kind = _kind(source)
            x = int(levels[column, token])
            if kind:
                x -= source
                if source < 0:
                    x = -x
            size = abs(x)
            _put(state, out, model, own + kind, 1 if size else 0)
            if size == 0:
                continue
            _put(state, out, model, own + _KINDS + kind, 1 if x < 0 else 0)
            at = own + 2 * _KINDS
            for i in range(min(size, _UNARY + 1) - 1):
                _put(state, out, model, at + i, 1)
            if size <= _UNARY:
                _put(state, out, model, at + size - 1, 0)
                continue
            rest = size - _UNARY
            bits = 0
            while rest >> (bits + 1):
                bits += 1
            _put_plain(state, out, (1 << bits) - 1, bits)
            _put_plain(state, out, 0, 1)
            _put_plain(state, out, rest & ((1 << bits) - 1), bits)
    for _ in range(5):
        _shift_low(state, out)
    return int(state[_AT])


@jit
def get_levels(
    data: Bytes, sources: Levels, classes: Integers, model: Model, levels: Levels
) -> int:
    """Inverse of `put_levels`: levels, out, and the bytes that were read; -1 if it can't be right.

    Whatever the bytes are, it ends after so many steps as there are levels.
    """
    columns, tokens = levels.shape
    low, span, at = 0, _MASK, 0
    for _ in range(5):
        low = ((low << 8) | _next_byte(data, at)) & _MASK
        at += 1
    for column in range(columns):
        own = int(classes[column]) * _CONTEXTS
        sizes = own + 2 * _KINDS
        for token in range(tokens):
            source = int(sources[column, token])
            kind = _kind(source)
            x = 0
            bit, low, span, at = _get(low, span, at, data, model, own + kind)
            if bit:
                context = own + _KINDS + kind
                negative, low, span, at = _get(low, span, at, data, model, context)
                x = 1
                while x <= _UNARY:
                    bit, low, span, at = _get(low, span, at, data, model, sizes + x - 1)
                    if not bit:
                        break
                    x += 1
                if x > _UNARY:
                    bits = 0
                    bit, low, span, at = _get_plain(low, span, at, data, 1)
                    while bit:
                        bits += 1
                        if bits > _BITS:
                            return -1
                        bit, low, span, at = _get_plain(low, span, at, data, 1)
                    rest, low, span, at = _get_plain(low, span, at, data, bits)
                    x = _UNARY + (1 << bits) + rest
                if negative:
                    x = -x
            if kind:
                if source < 0:
                    x = -x
                x += source
            if abs(x) > 32767:
                return -1
            levels[column, token] = x
    return at
