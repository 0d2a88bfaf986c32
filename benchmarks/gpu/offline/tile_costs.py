"""Instructions per code of `code_tiles.wide_tile`, compiled alone for each type of code.

Inside `payload_kernels` the tiles of all types are branches of one kernel, whose static
instructions say nothing about what one of them costs.
"""

from __future__ import annotations

import torch
import triton.language as tl

from benchmarks.gpu.offline import compiled  # isort: skip

from kvtc_vllm.codec.kernels.code_tiles import wide_tile  # isort: skip
from kvtc_vllm.codec.kernels.jit import EXACT, jit  # isort: skip
from kvtc_vllm.codec.kernels.bit_tables import TOKENS  # isort: skip
from kvtc_vllm.codec.kernels.resident import COLUMNS  # isort: skip


@jit(do_not_specialize=("size", "stream", "tokens", "first", "column"))
def _tile_kernel(  # type: ignore[no-untyped-def]
    coefficients,
    row_stride,
    payloads,
    flag,
    first,
    column,
    size,
    stream,
    tokens,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,
    PACK: tl.constexpr,
):
    token = first + tl.arange(0, TOKENS)
    wide_tile(
        coefficients + column * 64,
        row_stride,
        payloads,
        payloads + stream * 4,
        flag,
        token,
        column * 64,
        size * 64,
        stream,
        tokens,
        BITS,
        PACK,
    )


def instructions_per_code(capability: int) -> dict[tuple[str, int], float]:
    """("pack" or "unpack", bits) -> static instructions over codes per thread."""
    payloads = torch.zeros(64, dtype=torch.uint8)
    flag = torch.zeros(1, dtype=torch.int32)
    found: dict[tuple[str, int], float] = {}
    for way, dtype in (("pack", torch.float32), ("unpack", torch.float16)):
        coefficients = torch.zeros(1, 64, dtype=dtype)
        for bits in (2, 4, 8):
            launches = compiled.record(capability)
            _tile_kernel[(1,)](
                coefficients,
                coefficients.stride(0),
                payloads,
                flag,
                0,
                1,
                5,
                640,
                128,
                TOKENS=TOKENS,
                BITS=bits,
                PACK=way == "pack",
                **EXACT,
            )
            (code,) = launches.machine_code()
            found[way, bits] = code.instructions / (TOKENS * COLUMNS / code.threads)
    return found
