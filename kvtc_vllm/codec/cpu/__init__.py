"""The fast way of version 1 on a CPU: compiled loops, and products of int8 where they are faster.

`CpuKvtcCodec` in `codec` is the reference's twin: it writes and reads the same blobs. `coding` does
what quantisers, packing and payload do, bit for bit; `rows` does RoPE, mean and casts; `products`
gives the coefficients, in a precision that the plan allows. All but this module import numba, which
takes a second and may be missing, so they are imported late.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtc_vllm.codec.cpu.codec import CpuKvtcCodec


def fast_kvtc() -> type[CpuKvtcCodec] | None:
    """The class, or None where numba is not installed."""
    if find_spec("numba") is None:
        return None
    from kvtc_vllm.codec.cpu.codec import CpuKvtcCodec

    return CpuKvtcCodec
