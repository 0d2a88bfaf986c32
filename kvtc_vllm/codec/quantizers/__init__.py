"""Quantisers by name. One file per method, one row here.

The allocation's fourth type, "none", stores nothing and reads back as zero; it
is the absence of a group and so has no row.
"""

from __future__ import annotations

from kvtc_vllm.codec.quantizers.base import (
    SHIFT_SCALE_BITS,
    Quantizer,
    group_cost_bits,
)
from kvtc_vllm.codec.quantizers.fp8 import FP8
from kvtc_vllm.codec.quantizers.uniform import INT2, INT4

_QUANTIZERS: tuple[Quantizer, ...] = (INT2, INT4, FP8)
REGISTRY: dict[str, Quantizer] = {q.name: q for q in _QUANTIZERS}
BY_TYPE_ID: dict[int, Quantizer] = {q.type_id: q for q in REGISTRY.values()}

__all__ = ["BY_TYPE_ID", "REGISTRY", "SHIFT_SCALE_BITS", "Quantizer", "group_cost_bits"]
