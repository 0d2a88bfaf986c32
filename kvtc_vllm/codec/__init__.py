"""Pure tensors -> bytes -> tensors. Imports torch and numpy, never vLLM.

>>> import torch
>>> shape = Geometry(2, num_kv_heads=1, head_size=4, head_size_v=4, layer_groups=((0, 2),))
>>> codec = open_codec("raw", torch.bfloat16, geometry=shape)
>>> k = v = torch.arange(64).view(8, 2, 1, 4).bfloat16()  # [tokens, layers, heads, size]
>>> blob = codec.encode(k, v, start=0)
>>> torch.equal(codec.decode(blob, expect_start=0, expect_tokens=8).k, k)
True

"kvtc" takes an artifact and a target ratio instead of the geometry. The GPU's batches are
`kvtc_vllm.codec.kernels`, which nothing here imports.
"""

from kvtc_vllm.codec.artifact import Geometry, RankArtifact
from kvtc_vllm.codec.base import Blob, ChunkCodec, DecodedChunk, DecodedGroup
from kvtc_vllm.codec.errors import ArtifactError, CodecError, ContainerError
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.registry import CODECS, max_blob_bytes, open_codec

__all__ = [
    "CODECS",
    "ArtifactError",
    "Blob",
    "ChunkCodec",
    "CodecError",
    "ContainerError",
    "DecodedChunk",
    "DecodedGroup",
    "Geometry",
    "RankArtifact",
    "TransformCodec",
    "max_blob_bytes",
    "open_codec",
]
