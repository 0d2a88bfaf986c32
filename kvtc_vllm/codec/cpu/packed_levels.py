"""The payload of a step plan <-> levels, by compiled loops. Imports numba.

Bytes and errors are those of `kvtc_vllm.codec.v2.codes`; here no coefficients are made of them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtc_vllm.codec.cpu.jit import jit
from kvtc_vllm.codec.cpu.levels import count_escapes
from kvtc_vllm.codec.cpu.rows import Bytes, Integers
from kvtc_vllm.codec.packing import packed_size
from kvtc_vllm.codec.v2.codes import WIDE, WIDE_BYTES, uneven_escapes
from kvtc_vllm.codec.v2.plan import StepPlan

Levels = npt.NDArray[np.int32]
_WIDE = 255


def unpack_levels(payload: bytearray, plan: StepPlan, tokens: int) -> Levels:
    """Levels int32 [r, T] of a payload. Raises ContainerError("bounds") as `decode_codes` does."""
    data = np.frombuffer(payload, np.uint8)
    levels = np.zeros((plan.rank, tokens), np.int32)
    at = 0
    packed: list[Bytes] = []
    for part in plan.packed:
        packed.append(data[at : at + part.packed_bytes(tokens)])
        at += part.packed_bytes(tokens)
    if at > len(data):
        raise uneven_escapes()
    lows: list[Bytes] = []
    for own, part in zip(packed, plan.packed, strict=True):
        count = count_escapes(own, tokens, part.width)
        lows.append(data[at : at + count])
        at += count
    if at > len(data):
        raise uneven_escapes()
    for own, low, part in zip(packed, lows, plan.packed, strict=True):
        size = WIDE_BYTES * int(np.count_nonzero(low == WIDE))
        wide = data[at : at + size]
        if len(wide) < size:
            raise uneven_escapes()
        at += size
        _unpack(own, low, wide, part.width, part.columns.numpy(), levels)
    if at != len(data):
        raise uneven_escapes()
    return levels


def pack_levels(levels: Levels, plan: StepPlan) -> list[bytes]:
    """Levels int32 [r, T], none beyond `MAX_LEVEL`, -> the streams of `encode_codes`."""
    tokens = levels.shape[1]
    streams: list[bytes] = []
    lows: list[bytes] = []
    wides: list[bytes] = []
    for part in plan.packed:
        columns = part.columns.numpy()
        packed = np.zeros(len(columns) * packed_size(tokens, part.width), np.uint8)
        low = np.empty(len(columns) * tokens, np.uint8)
        wide = np.empty(len(columns) * tokens, np.uint16)
        count, large = _pack(levels, columns, part.width, packed, low, wide)
        streams.append(packed.tobytes())
        lows.append(low[:count].tobytes())
        wides.append(wide[:large].astype("<u2").tobytes())
    return [stream for stream in (*streams, *lows, b"".join(wides)) if stream]


@jit
def take_tokens(levels: Levels, places: Integers, out: Levels, own: Integers) -> None:
    """out[:, own] = levels[:, places]."""
    for column in range(len(levels)):
        for i in range(len(own)):
            out[column, own[i]] = levels[column, places[i]]


@jit
def _unpack(
    packed: Bytes, low: Bytes, wide: Bytes, width: int, columns: Integers, levels: Levels
) -> None:
    tokens = levels.shape[1]
    size = (tokens * width + 7) // 8
    per_byte = 8 // width
    escape = (1 << width) - 1
    lows = wides = 0
    for i in range(len(columns)):
        own = levels[columns[i]]
        for at in range(size):
            byte = int(packed[i * size + at])
            for token in range(at * per_byte, min((at + 1) * per_byte, tokens)):
                code = byte & escape
                byte >>= width
                if code == escape:
                    code += int(low[lows])
                    if low[lows] == _WIDE:
                        code += int(wide[2 * wides]) + 256 * int(wide[2 * wides + 1])
                        wides += 1
                    lows += 1
                level = (code + 1) >> 1
                own[token] = level if code & 1 else -level


@jit
def _pack(
    levels: Levels,
    columns: Integers,
    width: int,
    packed: Bytes,
    low: Bytes,
    wide: npt.NDArray[np.uint16],
) -> tuple[int, int]:
    tokens = levels.shape[1]
    size = (tokens * width + 7) // 8
    per_byte = 8 // width
    escape = (1 << width) - 1
    lows = wides = 0
    for i in range(len(columns)):
        own = levels[columns[i]]
        for at in range(size):
            byte = 0
            first = at * per_byte
            for lane in range(min(per_byte, tokens - first)):
                level = int(own[first + lane])
                code = 2 * level - 1 if level > 0 else -2 * level
                if code >= escape:
                    beyond = code - escape
                    if beyond >= _WIDE:
                        wide[wides] = beyond - _WIDE
                        wides += 1
                        beyond = _WIDE
                    low[lows] = beyond
                    lows += 1
                    code = escape
                byte |= code << (lane * width)
            packed[i * size + at] = byte
    return lows, wides
