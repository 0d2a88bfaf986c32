"""The fast ways on a CPU: compiled loops, and products of int8 where they are faster.

`CpuKvtcCodec` and `CpuKvtc2Codec` in `codec` are the references' twins: they write and read the
same blobs. `coding` and `levels` do what quantisers, packing and payload of version 1 and 2 do, bit
for bit; `rows` does RoPE, mean and casts; `products` gives the coefficients, in a precision that
the plan allows. All but this module import numba, which takes a second and may be missing, so they
are imported late.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtc_vllm.codec.cpu.codec import CpuKvtc2Codec, CpuKvtcCodec
    from kvtc_vllm.codec.cpu.delta import DeltaCoder
    from kvtc_vllm.codec.cpu.requantise import Requantiser


def fast_kvtc() -> type[CpuKvtcCodec] | None:
    """The class of version 1, or None where numba is not installed."""
    if find_spec("numba") is None:
        return None
    from kvtc_vllm.codec.cpu.codec import CpuKvtcCodec

    return CpuKvtcCodec


def fast_kvtc2() -> type[CpuKvtc2Codec] | None:
    """The same of version 2."""
    if find_spec("numba") is None:
        return None
    from kvtc_vllm.codec.cpu.codec import CpuKvtc2Codec

    return CpuKvtc2Codec


def delta_coder() -> type[DeltaCoder] | None:
    """What makes differences between blobs of version 2, or None where numba is not installed."""
    if find_spec("numba") is None:
        return None
    from kvtc_vllm.codec.cpu.delta import DeltaCoder

    return DeltaCoder


def requantiser() -> type[Requantiser] | None:
    """What makes blobs of version 2 smaller, or None where numba is not installed."""
    if find_spec("numba") is None:
        return None
    from kvtc_vllm.codec.cpu.requantise import Requantiser

    return Requantiser
