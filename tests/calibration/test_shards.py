"""The rows of any tensor-parallel rank, from a capture of any size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvtc_vllm.calibration.shards import RankRows, layer_groups, rank_heads
from kvtc_vllm.calibration.spool import SpoolHeader, SpoolReader, SpoolWriter
from kvtc_vllm.codec.artifact import APART, PAIRED, Geometry
from kvtc_vllm.codec.errors import ArtifactError
from tests.calibration.toy import toy_rope

LAYERS, HEADS, SIZE, SIZE_V, TOKENS = 3, 4, 8, 4, 40


def cache(heads: int = HEADS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    k = torch.randn(TOKENS, LAYERS, heads, SIZE, generator=generator).bfloat16()
    v = torch.randn(TOKENS, LAYERS, heads, SIZE_V, generator=generator).bfloat16()
    return k, v


def captured(directory: Path, tp: int, heads: int = HEADS, first: int = 4) -> list[SpoolReader]:
    """What `tp` ranks of one engine leave, as vLLM shards the heads of `cache`."""
    k, v = cache(heads)
    for rank in range(tp):
        own = list(rank_heads(heads, tp, rank))
        header = SpoolHeader(
            geometry=Geometry(LAYERS, len(own), SIZE, SIZE_V, ((0, LAYERS),)),
            total_kv_heads=heads,
            dtype="bfloat16",
            layer_names=tuple(f"layers.{i}" for i in range(LAYERS)),
            layer_rope=(0, None, 0),
            rope_neox=(True,),
            rank=rank,
            tp_size=tp,
        )
        with SpoolWriter(directory / f"rank{rank}", header, (toy_rope(),)) as writer:
            flags = torch.arange(TOKENS) % 4 == 0
            positions = torch.arange(first, first + TOKENS)
            writer.append(k[:, :, own], v[:, :, own], positions, 0, flags)
    return [SpoolReader(directory / f"rank{rank}") for rank in range(tp)]


def test_heads_as_vllm_divides_them() -> None:
    assert [list(rank_heads(8, 4, rank)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [list(rank_heads(2, 4, rank)) for rank in range(4)] == [[0], [0], [1], [1]]
    with pytest.raises(ArtifactError, match=r"--tp 2: the model's 3 KV heads .* 1, 3 or a"):
        rank_heads(3, 2, 0)


@pytest.mark.parametrize("at", [1, 2, 4, 8])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_one_capture_serves_every_size(tmp_path: Path, at: int, tp: int) -> None:
    readers = captured(tmp_path / "there", at)
    # What a capture at `tp` itself would have left.
    expected = captured(tmp_path / "itself", tp)
    for rank in range(tp):
        sliced = RankRows(readers, tp, rank, 2)
        assert sliced.geometry == replace(
            expected[rank].geometry, layer_groups=((0, 2), (2, LAYERS))
        )
        expected[rank].geometry = sliced.geometry
        for group in (0, 1):
            k, v, both = (sliced.rows(group, n, heldout=False) for n in (*APART, *PAIRED))
            assert torch.equal(k, expected[rank].rows(group, "k", heldout=False))
            assert torch.equal(v, expected[rank].rows(group, "v", heldout=False))
            assert torch.equal(both, torch.cat((k, v), dim=1))
        assert torch.equal(sliced.probe().k, expected[rank].probe().k)


def test_rows_of_a_rank_are_a_slice_of_all_heads(tmp_path: Path) -> None:
    readers = captured(tmp_path, 1)
    whole = RankRows(readers, 1, 0, None).rows(0, "v", heldout=True)
    sliced = RankRows(readers, 2, 1, None).rows(0, "v", heldout=True)
    shape = (-1, LAYERS, HEADS, SIZE_V)
    assert torch.equal(sliced, whole.reshape(shape)[:, :, 2:].flatten(1))


def test_ranks_of_different_captures_are_refused(tmp_path: Path) -> None:
    mixed = [captured(tmp_path / "a", 2)[0], captured(tmp_path / "b", 2, first=5)[1]]
    with pytest.raises(ArtifactError, match=r"rank1: holds other tokens than .*rank0"):
        RankRows(mixed, 2, 0, None)


def test_layer_groups() -> None:
    assert layer_groups(5, None) == ((0, 5),)
    assert layer_groups(5, 2) == ((0, 2), (2, 4), (4, 5))
