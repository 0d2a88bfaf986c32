"""Entropy coders by name and by number. One file per coder, one row here.

What codes the same bytes on a GPU is `kvtc_vllm.codec.kernels.deflate_nvcomp`.
"""

from __future__ import annotations

from kvtc_vllm.codec.entropy.base import (
    MAX_UNIT_BYTES,
    UNIT_ALIGNMENT,
    UNIT_BYTES,
    UNIT_TARGET,
    EncodedSection,
    EntropyCoder,
    Unit,
    UnitList,
    aligned,
    cut_units,
    max_stored_bytes,
    padded,
    unit_lengths,
)
from kvtc_vllm.codec.entropy.deflate_cpu import DEFLATE, DeflateCoder
from kvtc_vllm.codec.entropy.raw import RAW, RawCoder

_CODERS: tuple[EntropyCoder, ...] = (RAW, DEFLATE)
REGISTRY: dict[str, EntropyCoder] = {coder.name: coder for coder in _CODERS}
BY_CODER_ID: dict[int, EntropyCoder] = {coder.coder_id: coder for coder in _CODERS}
GENERAL_CODER_IDS = frozenset(BY_CODER_ID)
"""Of coders that need no tables, so that the number alone is enough to read."""

__all__ = [
    "BY_CODER_ID",
    "DEFLATE",
    "GENERAL_CODER_IDS",
    "MAX_UNIT_BYTES",
    "RAW",
    "REGISTRY",
    "UNIT_ALIGNMENT",
    "UNIT_BYTES",
    "UNIT_TARGET",
    "DeflateCoder",
    "EncodedSection",
    "EntropyCoder",
    "RawCoder",
    "Unit",
    "UnitList",
    "aligned",
    "cut_units",
    "max_stored_bytes",
    "padded",
    "unit_lengths",
]
