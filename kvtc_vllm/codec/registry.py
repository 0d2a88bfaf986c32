"""Chunk codecs by name. One file a codec, one row here."""

from __future__ import annotations

from kvtc_vllm.codec.codec import ChunkCodec
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.raw import RawCodec

CODECS: dict[str, type[ChunkCodec]] = {codec.name: codec for codec in (RawCodec, KvtcCodec)}
BY_CODEC_ID: dict[int, type[ChunkCodec]] = {codec.codec_id: codec for codec in CODECS.values()}
