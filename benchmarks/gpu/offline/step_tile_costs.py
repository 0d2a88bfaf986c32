"""Instructions per code of the tiles of codec 2, compiled alone for each width of code.

A tile goes through its tokens in a loop; what is counted is that loop's body, once, and what comes
before and after it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from benchmarks.gpu.offline import compiled  # isort: skip

from kvtc_vllm.codec.kernels.jit import EXACT, jit  # isort: skip
from kvtc_vllm.codec.kernels.resident import COLUMNS  # isort: skip
from kvtc_vllm.codec.kernels.step_codes import TILE_WARPS  # isort: skip
from kvtc_vllm.codec.kernels.step_decoding import unpack_tile  # isort: skip
from kvtc_vllm.codec.kernels.step_encoding import encode_tile  # isort: skip
from kvtc_vllm.codec.kernels.step_tables import TOKENS  # isort: skip

_LISTED = tl.constexpr(15)
_COLUMNS = tl.constexpr(COLUMNS)


@jit(do_not_specialize=("length", "tokens"))
def _unpack_kernel(  # type: ignore[no-untyped-def]
    coefficients, row_stride, marks, payload, counts, values, numbers, length, tokens,
    BITS: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, _COLUMNS)
    low = tl.load(counts + lane).to(tl.int64)
    high = tl.load(counts + _COLUMNS + lane).to(tl.int64)
    known = values + tl.load(counts + 2 * _COLUMNS + lane) * _LISTED - 1
    target = coefficients + lane
    first_row = tl.program_id(0).to(tl.int64) * tokens
    unpack_tile(
        target, row_stride, target, row_stride, marks, 0, first_row, payload, payload, lane,
        lane < length, low, high, length, tokens, known, _LISTED, numbers, BITS, False,
    )  # fmt: skip


@jit(do_not_specialize=("length", "tokens", "capacity"))
def _encode_kernel(  # type: ignore[no-untyped-def]
    coefficients, row_stride, marks, payload, counts, rounding, numbers, place, magnitude, length,
    tokens, capacity, BITS: tl.constexpr, ESCAPES: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, _COLUMNS)
    dead, shift = tl.load(rounding + lane), tl.load(rounding + _COLUMNS + lane)
    first_row = tl.program_id(0).to(tl.int64) * tokens
    encode_tile(
        coefficients + lane, row_stride, marks, 0, first_row, payload, lane, lane < length, tokens,
        dead, shift, numbers, counts + lane, counts + _COLUMNS + lane, place, payload, capacity,
        magnitude, BITS, False, ESCAPES,
    )  # fmt: skip


def step_instructions_per_code(capability: int) -> dict[tuple[str, int], float]:
    """("unpack", "pack" or "escapes", bits) -> static instructions over codes per thread."""
    payload = torch.zeros(64, dtype=torch.uint8)
    marks = place = torch.zeros(8, dtype=torch.int64)
    counts = torch.zeros(256, dtype=torch.int32)
    floats = torch.zeros(256)
    found: dict[tuple[str, int], float] = {}
    for bits in (2, 4, 8):
        launches = compiled.record(capability)
        narrow = torch.zeros(1, 64, dtype=torch.float16)
        _unpack_kernel[(1,)](
            narrow, narrow.stride(0), marks, payload, counts, floats, floats, 64, 128, BITS=bits,
            num_warps=TILE_WARPS, **EXACT,
        )  # fmt: skip
        found["unpack", bits] = _cost(launches)
        for way, escapes in (("pack", False), ("escapes", True)):
            launches = compiled.record(capability)
            wide = torch.zeros(1, 64)
            _encode_kernel[(1,)](
                wide, wide.stride(0), marks, payload, counts, floats, floats, place, counts, 64,
                128, 4096, BITS=bits, ESCAPES=escapes, num_warps=TILE_WARPS,
                **EXACT,
            )  # fmt: skip
            found[way, bits] = _cost(launches)
    return found


def _cost(launches: Any) -> float:
    (code,) = launches.machine_code()
    return code.instructions / (TOKENS * COLUMNS / code.threads)
