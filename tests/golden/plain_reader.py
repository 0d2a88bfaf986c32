"""A second decoder, written from FORMAT.md with numpy, zlib and struct only.

It shares no code with the package: where both give the same values, FORMAT.md
says what the package does. It trusts its input.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import xxhash


class PlainSection(NamedTuple):
    """mean [p], basis [p, r] float32, groups (start, size, type) in any order."""

    mean: np.ndarray
    basis: np.ndarray
    groups: Sequence[tuple[int, int, str]]

    def read(self, payload: bytes, marks: Sequence[int]) -> np.ndarray:
        assert not any(marks)
        return read_coefficients(payload, self, len(marks))

    def add_beyond(self, payload: bytes, marks: Sequence[int], coefficients: np.ndarray) -> None:
        raise AssertionError("codec 1 marks no tokens")


class AnySection(Protocol):
    """read: a payload and whether each token is marked -> coefficients [tokens, r]. add_beyond: a
    payload of marked tokens alone, into coefficients.
    """

    @property
    def mean(self) -> np.ndarray: ...

    @property
    def basis(self) -> np.ndarray: ...

    def read(self, payload: bytes, marks: Sequence[int]) -> np.ndarray: ...

    def add_beyond(
        self, payload: bytes, marks: Sequence[int], coefficients: np.ndarray
    ) -> None: ...


class PlainRope(NamedTuple):
    """cos and sin [positions, rotary_dim / 2] float32."""

    cos: np.ndarray
    sin: np.ndarray
    neox: bool


TYPES = {"int2": (1, 2), "int4": (2, 4), "fp8": (3, 8)}
ITEM_BYTES = {1: 2, 2: 2, 3: 4, 4: 1, 5: 1}
BEYOND = {6: 0, 7: 1, 9: 8}
"""Kinds of what marked tokens have beyond a coded section, and the kind of that one."""


def cache_values(raw: bytes, dtype_code: int) -> np.ndarray:
    if dtype_code == 1:
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    if dtype_code == 4:
        return np.array([e4m3(code) for code in raw], "<f4")
    if dtype_code == 5:
        return (np.frombuffer(raw, np.uint8).astype("<u2") << 8).view("<f2").astype("<f4")
    return np.frombuffer(raw, "<f2" if dtype_code == 2 else "<f4").astype("<f4")


def e4m3(code: int) -> float:
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


def read_coefficients(payload: bytes, section: PlainSection, tokens: int) -> np.ndarray:
    groups = sorted(section.groups, key=lambda g: (TYPES[g[2]][0], g[1], g[0]))
    n = len(groups) * tokens
    high, low = payload[: 2 * n], payload[2 * n : 4 * n]
    side = np.array([(low[i], high[i]) for i in range(2 * n)], np.uint8).reshape(-1)
    shift, scale = side.view("<f2").astype(np.float32).reshape(2, len(groups), tokens)
    coefficients = np.zeros((tokens, section.basis.shape[1]), np.float32)
    at = 4 * n
    for g, (start, size, kind) in enumerate(groups):
        bits = TYPES[kind][1]
        length = (tokens * size * bits + 7) // 8
        run = int.from_bytes(payload[at : at + length], "little")
        at += length
        for t in range(tokens):
            for c in range(size):
                code = run >> (t * size + c) * bits & (1 << bits) - 1
                value = e4m3(code) if kind == "fp8" else code
                coefficients[t, start + c] = value * scale[g, t] + shift[g, t]
    assert at == len(payload)
    return coefficients


def rotate(key: np.ndarray, rope: PlainRope | None, position: int) -> np.ndarray:
    if rope is None:
        return key
    cos, sin = rope.cos[position], rope.sin[position]
    half = len(cos)
    out = key.copy()
    first = slice(0, half) if rope.neox else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if rope.neox else slice(1, 2 * half, 2)
    out[first] = key[first] * cos - key[second] * sin
    out[second] = key[second] * cos + key[first] * sin
    return out


def read_blob(
    blob: bytes,
    layer_groups: Sequence[tuple[int, int]],
    sections: Mapping[tuple[int, int], AnySection],
    ropes: Sequence[PlainRope | None],
    scales: Sequence[tuple[float, float]] | None = None,
) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """K and V as float32 [T, L, H, D], before rounding to the cache dtype, and the payloads.

    sections: by (layer group, kind of its coded section: 0 K, 1 V, 8 a pair). ropes: one for each
    layer. scales: what elements of K and V of each layer are multiplied by, if the cache has such.
    """
    assert blob[:6] == b"KVTC\x01\x00"
    assert xxhash.xxh3_128(blob[:-16]).digest() == blob[-16:]
    (codec, flags, dtype, sinks, layers, heads, size_k, size_v, _, count, tokens, start) = (
        struct.unpack_from("<HHBBHHHHHHIQ", blob, 6)
    )
    assert codec in (0, 1, 2)
    assert flags == 0
    table = [struct.unpack_from("<BBHIII", blob, 76 + 16 * i) for i in range(count)]
    unit_at = 76 + 16 * count
    body_at = unit_at + 4 * sum(row[3] for row in table)
    k = np.zeros((tokens, layers, heads, size_k), np.float32)
    v = np.zeros((tokens, layers, heads, size_v), np.float32)
    payloads = []
    marks = [0] * (tokens - sinks)
    coded: dict[tuple[int, int], np.ndarray] = {}
    for kind, coder, group, units, raw_length, stored_length in table:
        body = blob[body_at : body_at + stored_length]
        body_at += -(-stored_length // 4) * 4
        payload = body if coder == 0 else b""
        at = 0
        for _ in range(units):
            raw, stored = (x + 1 for x in struct.unpack_from("<HH", blob, unit_at))
            piece = body[at : at + stored]
            payload += piece if raw == stored else zlib.decompress(piece, wbits=-15)
            at += -(-stored // 4) * 4
            unit_at += 4
        assert len(payload) == raw_length
        payloads.append(payload)
        if kind == 5:
            marks = [payload[i // 8] >> i % 8 & 1 for i in range(tokens - sinks)]
        elif kind == 3:
            k[:] = cache_values(payload, dtype).reshape(k.shape)
        elif kind == 4:
            v[:] = cache_values(payload, dtype).reshape(v.shape)
        elif kind == 2:
            item = ITEM_BYTES[dtype]
            k_bytes = k[:sinks].size * item
            for target, part in ((k, payload[:k_bytes]), (v, payload[k_bytes:])):
                planes = np.frombuffer(part, np.uint8).reshape(item, -1)
                raw_values = planes[::-1].T.tobytes()
                target[:sinks] = cache_values(raw_values, dtype).reshape(target[:sinks].shape)
        elif kind in BEYOND:
            place = group, BEYOND[kind]
            sections[place].add_beyond(payload, marks, coded[place])
        else:
            coded[group, kind] = sections[group, kind].read(payload, marks)
    for (group, kind), coefficients in coded.items():
        section = sections[group, kind]
        rows = coefficients @ section.basis.T + section.mean
        first, end = layer_groups[group]
        key_elements = (0 if kind == 1 else end - first) * heads * size_k
        for tensor, part in enumerate((rows[:, :key_elements], rows[:, key_elements:])):
            if not part.shape[1]:
                continue
            values = part.reshape(tokens - sinks, end - first, heads, -1)
            for layer in range(first, end):
                values[:, layer - first] /= 1 if scales is None else scales[layer][tensor]
            if tensor == 1:
                v[sinks:, first:end] = values
                continue
            for t in range(sinks, tokens):
                for layer in range(first, end):
                    for head in range(heads):
                        key = values[t - sinks, layer - first, head]
                        k[t, layer, head] = rotate(key, ropes[layer], start + t)
    assert body_at == len(blob) - 16
    return k, v, payloads
