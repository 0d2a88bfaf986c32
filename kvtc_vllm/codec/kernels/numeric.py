"""Number formats: operands of matrix products, and exact conversions inside kernels.

bfloat16 and float8 are converted with integer arithmetic: the results then do not depend on the
GPU's generation, and Triton's interpreter, which truncates, gives the same ones.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton.language as tl

from kvtc_vllm.codec.kernels.jit import jit
from kvtc_vllm.codec.quantizers import base, fp8

FP16_MAX = tl.constexpr(base.FP16_MAX)
E4M3_MAX = tl.constexpr(fp8.E4M3_MAX)
E5M2_MAX = tl.constexpr(torch.finfo(torch.float8_e5m2).max)

Precision = Literal["float32", "float16"]
"""Type of the operands of matrix products.

float16 is enough: a basis is float16 to begin with, and rows and coefficients lose no more than
TF32 would take, at twice its rate and half its bytes.
"""
OPERAND: dict[Precision, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """a @ b summed in float32, into `out` and returned; both operands float32 or both float16.

    out: float32, or float16 for float16 operands: rounded from float32, infinite beyond its
    range. Sets no global flag of torch.
    """
    if a.shape[1] == 0:
        return out.zero_()
    if a.dtype == out.dtype and (a.dtype == torch.float32 or a.device.type != "cpu"):
        return torch.mm(a, b, out=out)
    if a.device.type != "cpu":
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a.float() @ b.float())


def products(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`product` of each pair of matrices: a [G, n, k], b [G, k, m], out [G, n, m]; on a GPU in one
    launch, which needs no copy if the last dimension of each, or the one before, is contiguous."""
    if out.shape[0] == 1 or a.device.type == "cpu":
        for one, other, result in zip(a, b, out, strict=True):
            product(one, other, result)
        return out
    if a.shape[2] == 0:
        return out.zero_()
    if a.dtype == out.dtype:
        return torch.bmm(a, b, out=out)
    return torch.bmm(a, b, out_dtype=out.dtype, out=out)


def storage(x: torch.Tensor) -> torch.Tensor:
    """x as kernels take it: bfloat16 as int16, other dtypes as they are."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def storage_type(dtype: torch.dtype) -> tl.dtype:
    """Element type behind the pointers of a cache with this dtype; no two dtypes share one."""
    types = {
        torch.bfloat16: tl.int16,
        torch.float16: tl.float16,
        torch.float32: tl.float32,
        torch.float8_e4m3fn: tl.uint8,
        torch.float8_e5m2: tl.int8,
    }
    if dtype not in types:
        raise ValueError(f"no kernel for caches of {dtype}, only {list(types)}")
    return types[dtype]


@jit()
def widen(stored):  # type: ignore[no-untyped-def]
    """Elements as loaded through `storage` or `storage_type` -> float32, exactly."""
    if stored.dtype == tl.int16:
        x = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif stored.dtype == tl.uint8:
        x = e4m3_decode(stored.to(tl.int32))
    elif stored.dtype == tl.int8:
        # E5M2 is the upper byte of a float16.
        x = (stored.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        x = stored.to(tl.float32)
    return x


@jit()
def saturate_fp16(x):  # type: ignore[no-untyped-def]
    """float32 -> float16, to nearest even, largest finite value instead of infinity."""
    return tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX).to(tl.float16)


@jit()
def narrow(x, stored_type: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 -> storage of a cache, to nearest even; float16 and float8 saturate."""
    if stored_type == tl.int16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        stored = tl.where(x == x, rounded, 0x7FC0).to(tl.int16)
    elif stored_type == tl.float16:
        stored = saturate_fp16(x)
    elif stored_type == tl.uint8:
        stored = with_sign(e4m3_encode(tl.minimum(tl.abs(x), E4M3_MAX)), x).to(tl.uint8)
    elif stored_type == tl.int8:
        stored = with_sign(e5m2_encode(tl.minimum(tl.abs(x), E5M2_MAX)), x).to(tl.int8)
    else:
        stored = x
    return stored


@jit()
def with_sign(code, x):  # type: ignore[no-untyped-def]
    """Code of the magnitude of x -> code of x, int32; of NaN the NaN of either float8 format."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 128
    return sign | tl.where(x == x, code, 0x7F)


@jit()
def round_to_code(y, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Clamp float32 to [0, TOP], round half to even, int32. TOP < 2**22."""
    # In [2^23, 2^24) floats are the integers, so the addition does the rounding.
    magic = tl.minimum(tl.maximum(y, 0.0), TOP) + 12582912.0
    return magic.to(tl.int32, bitcast=True) & 0x3FFFFF


@jit()
def e4m3_encode(y):  # type: ignore[no-untyped-def]
    """float32 in [-448, 448] -> code of float8_e4m3fn, int32, to nearest even; -0 gives 0."""
    magnitude = tl.abs(y)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # One unit in the last place of 2^14 is 2^-9, the step of E4M3's subnormals.
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(y < 0, 128, 0) | tl.where(magnitude < 0.015625, subnormal, normal)


@jit()
def e5m2_encode(magnitude):  # type: ignore[no-untyped-def]
    """float32 in [0, 57344] -> code of float8_e5m2, int32, to nearest even."""
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0xFFFFF + ((bits >> 21) & 1)) >> 21) - (112 << 2)
    # One unit in the last place of 2^7 is 2^-16, the step of E5M2's subnormals.
    subnormal = (magnitude + 128.0).to(tl.int32, bitcast=True) - 0x43000000
    return tl.where(magnitude < 0.00006103515625, subnormal, normal)


@jit()
def e4m3_decode(code):  # type: ignore[no-untyped-def]
    """Code of float8_e4m3fn, int32 -> float32; 0x7F and 0xFF give NaN."""
    magnitude = code & 127
    normal = ((magnitude + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 127, float("nan"), value)
    # The sign as a bit: compiled, `-value` is 0 - value, and that of 0 is not -0.
    return (value.to(tl.int32, bitcast=True) | ((code & 128) << 24)).to(tl.float32, bitcast=True)
