"""Reasons of errors, by which callers decide and metrics count."""

from __future__ import annotations

import pickle

import pytest
import torch

from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.entropy import UnitList
from kvtc_vllm.codec.errors import ArtifactError, CodecError, ContainerError
from tests.codec.contract import MODEL, open_made_up


def reason(codec: ChunkCodec, k: torch.Tensor, v: torch.Tensor, start: int = 64) -> str:
    with pytest.raises(CodecError) as caught:
        codec.encode(k, v, start)
    return caught.value.reason


def test_why_a_chunk_is_not_coded() -> None:
    codec = open_made_up("kvtc")
    k, v = MODEL.chunk(8, 64)
    assert reason(codec, k, v, 8190) == "position"
    assert reason(codec, k, v * 60000.0) == "range"
    k[3, 1, 1, 1] = float("nan")
    assert reason(codec, k, v) == "non_finite"
    with pytest.raises(CodecError) as caught:
        UnitList.of(torch.tensor([[65537, 1]]).numpy())
    assert caught.value.reason == "size"


@pytest.mark.parametrize(
    ("error", "text", "why"),
    [
        (CodecError("range", "too large"), "too large", "range"),
        (ContainerError("magic", "starts with 0"), "magic: starts with 0", "magic"),
        (ArtifactError("gone"), "gone", "artifact"),
    ],
)
def test_errors_travel_whole(error: CodecError, text: str, why: str) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.reason) == (type(error), text, why)
