"""The fast codecs with int8 products even where matrices are too small to gain by them."""

from __future__ import annotations

from functools import partialmethod

from kvtc_vllm.codec.cpu.codec import CpuKvtc2Codec, CpuKvtcCodec
from kvtc_vllm.codec.cpu.products import has_int8_products


class Int8Codec(CpuKvtcCodec):
    """Of int8 if this CPU multiplies them exactly."""

    __init__ = partialmethod(CpuKvtcCodec.__init__, int8=has_int8_products())


class Int8Codec2(CpuKvtc2Codec):
    """The same of version 2."""

    __init__ = partialmethod(CpuKvtc2Codec.__init__, int8=has_int8_products())


INT8_CODECS = {codec.name: codec for codec in (Int8Codec, Int8Codec2)}
