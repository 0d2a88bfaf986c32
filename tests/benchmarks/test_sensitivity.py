"""An artifact's parts for several cache groups: each codes its own layers, all bytes count."""

from __future__ import annotations

import torch

from benchmarks.sensitivity import through
from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.registry import open_codec

TOKENS, CHUNK, HEADS, SIZE = 10, 4, 2, 8


def raw(layers: int) -> ChunkCodec:
    geometry = Geometry(
        num_layers=layers,
        num_kv_heads=HEADS,
        head_size=SIZE,
        head_size_v=SIZE,
        layer_groups=((0, layers),),
    )
    return open_codec("raw", torch.bfloat16, geometry=geometry)


def test_layers_of_every_part_come_back_in_their_places() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, TOKENS, 3, HEADS, SIZE, generator=generator).bfloat16()

    stored, back_k, back_v = through([([1], raw(1)), ([0, 2], raw(2))], k, v, CHUNK)

    assert torch.equal(back_k, k)
    assert torch.equal(back_v, v)
    alone, _, _ = through([([0], raw(1))], k[:, :1], v[:, :1], CHUNK)
    both, _, _ = through([([0, 1], raw(2))], k[:, :2], v[:, :2], CHUNK)
    assert stored == alone + both
    assert stored > k.nbytes + v.nbytes
