"""kvtc v1: the coefficients of every section quantised by its bit plan, then DEFLATE.

Source: KVTC, arXiv 2511.01815, section 3.2; the payload is `kvtc_vllm.codec.payload`.
"""

from __future__ import annotations

from typing import ClassVar

from kvtc_vllm.codec.frame import TransformCodec


class KvtcCodec(TransformCodec):
    """`TransformCodec` whose section coders are bit plans."""

    codec_id: ClassVar[int] = 1
    name: ClassVar[str] = "kvtc"
