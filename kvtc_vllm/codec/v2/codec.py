"""kvtc v2: coefficients quantised by one step, sinks more finely, then DEFLATE without matches.

The payload is `kvtc_vllm.codec.v2.codes`, the quantiser `kvtc_vllm.codec.v2.plan`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from kvtc_vllm.codec.entropy import DeflateCoder
from kvtc_vllm.codec.frame import TransformCodec

ENTROPY = DeflateCoder(matches=False)
"""What calibration counts bytes with. Matches cost more than they save here."""


class Kvtc2Codec(TransformCodec):
    """`TransformCodec` whose section coders are step plans, and which marks sinks."""

    codec_id: ClassVar[int] = 2
    name: ClassVar[str] = "kvtc2"
    marks_sinks: ClassVar[bool] = True
    pairs: ClassVar[bool] = True

    def _entropy_coder(self, level: int) -> DeflateCoder:
        return replace(ENTROPY, level=level)
