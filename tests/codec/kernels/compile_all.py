"""Compiles every kernel for GPU generations that need not be present, down to machine code.

    python -m tests.codec.kernels.compile_all [80 90 100]

Prints one line per kernel. Fails if one does not compile, or if one whose results must equal the
CPU's contains a fused multiply-add, flushes subnormals, or divides approximately.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Before the kernels are imported: they are then decorated for compilation.
torch.cuda.is_available = lambda: True

from kvtc_vllm.codec.kernels import (  # noqa: E402
    deflate_nvcomp,
    paged_io,
    payload_kernels,
)

INEXACT = re.compile(r"fma\.rn|\.ftz|div\.full|div\.approx|rcp\.approx")
PAGED = {
    "pointers": "*i64",
    **dict.fromkeys(("page_stride", "head_stride", "token_stride", "dim_stride"), "i64"),
    **dict.fromkeys(("slots", "positions"), "*i64"),
    **dict.fromkeys(("mean", "scales"), "*fp32"),
    "row_stride": "i64",
    "page_tokens": "i32",
}
PLAN = {
    "coefficients": "*fp32",
    "row_stride": "i64",
    "payloads": "*u8",
    "payload_bytes": "i64",
    "groups": "*i64",
    "tiles": "*i32",
    "num_groups": "i32",
    "tokens": "i32",
    "damaged": "*i32",
}


def cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, argument types, constants."""
    for element, table in (
        (tl.int16, "*i16"),
        (tl.float16, "*fp32"),
        (tl.float32, "*fp16"),
        (tl.uint8, "*i16"),
        (tl.int8, "*i16"),
    ):
        for half, neox, rows in ((64, True, "*fp16"), (64, False, "*fp32"), (16, True, "*fp32")):
            constants = {
                "TYPE": element,
                "HEADS": 8,
                "HEAD_SIZE": 128,
                "HALF": half,
                "NEOX": neox,
                "HAS_MEAN": True,
                "HAS_SCALE": element in (tl.uint8, tl.int8),
                "HEAD_TILE": 8,
                "PAIR_TILE": half,
                "REST_TILE": triton.next_power_of_2(max(128 - 2 * half, 1)),
            }
            types = {**PAGED, "cos_sin": table, "rows": rows}
            name = f"{element} half={half} neox={neox} {rows}"
            yield f"gather {name}", paged_io._gather_kernel, types, constants
            yield f"scatter {name}", paged_io._scatter_kernel, types, constants
    tile = {"TOKEN_TILE": payload_kernels._TOKEN_TILE, "TILE": payload_kernels._COEFFICIENT_TILE}
    yield "range", payload_kernels._range_kernel, PLAN, tile
    for name, element, pack in (
        ("pack", "*fp32", True),
        ("unpack *fp32", "*fp32", False),
        ("unpack *fp16", "*fp16", False),
    ):
        types = {**PLAN, "coefficients": element}
        constants = {"BYTES": payload_kernels.TILE_BYTES, "PACK": pack}
        yield name, payload_kernels._codes_kernel, types, constants
    types = dict.fromkeys(("sources", "targets", "lengths"), "*i64")
    yield "copy", deflate_nvcomp._copy_kernel, types, {"TILE": deflate_nvcomp._COPY_TILE}


def main(capabilities: list[int]) -> None:
    """Compile everything for every capability."""
    for capability in capabilities:
        for name, kernel, types, constants in cases():
            signature = {
                argument: "constexpr" if argument in constants else types[argument]
                for argument in kernel.arg_names
            }
            compiled = triton.compile(
                ASTSource(kernel, signature, constexprs=constants),
                target=GPUTarget("cuda", capability, 32),
                options={"enable_fp_fusion": False},
            )
            ptx = compiled.asm["ptx"]
            found = sorted(set(INEXACT.findall(ptx)))
            if found:
                sys.exit(f"sm_{capability} {name}: {found} in the generated code")
            print(f"sm_{capability} {name}: {len(compiled.asm['cubin'])} bytes")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [80, 90])
