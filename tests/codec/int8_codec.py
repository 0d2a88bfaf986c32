"""The fast codec with int8 products even where matrices are too small to gain by them."""

from __future__ import annotations

from functools import partialmethod

from kvtc_vllm.codec.cpu.codec import CpuKvtcCodec
from kvtc_vllm.codec.cpu.products import has_int8_products


class Int8Codec(CpuKvtcCodec):
    """Of int8 if this CPU multiplies them exactly."""

    __init__ = partialmethod(CpuKvtcCodec.__init__, int8=has_int8_products())
