"""xKV: exact where the rank suffices, on keys as they were before their rotation."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.evaluation.baselines.formats import low_rank
from kvtc_vllm.evaluation.baselines.xkv import Xkv
from tests.evaluation.baselines.samples import (
    GEOMETRY,
    START,
    Cache,
    random_cache,
    relative_error,
    reload,
    rope,
)

TOKENS = 200


def low_rank_cache(rank: int) -> Cache:
    """Rows of all layers from `rank` directions; keys pre-RoPE."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(TOKENS, rank, generator=generator)
    return tuple(
        (mix @ torch.randn(rank, 5 * 2 * size, generator=generator)).view(TOKENS, 5, 2, size)
        for size in (GEOMETRY.head_size, GEOMETRY.head_size_v)
    )


@pytest.mark.parametrize("tokens", [1, 20, 896])
def test_size_is_both_factors_of_every_group(tokens):
    expected = 0
    for layers in (4, 1):
        for width, share in ((layers * 2 * 64, 1 / 8), (layers * 2 * 32, 3 / 16)):
            expected += min(int(width * share), tokens) * (tokens + width) * 2
    parts = Xkv(GEOMETRY, torch.bfloat16).compress(*random_cache(tokens, torch.bfloat16), START)
    assert sum(map(len, parts)) == expected


def test_exact_where_the_rank_suffices():
    k, v = low_rank_cache(rank=8)
    back = reload(Xkv(GEOMETRY, torch.float32), k, v)
    for restored, original in zip(back, (k, v), strict=True):
        assert relative_error(restored, original) < 1e-6


def test_keys_are_compressed_before_their_rotation():
    plain, v = low_rank_cache(rank=8)
    embedding = rope()
    k = embedding.apply(plain, torch.arange(START, START + TOKENS))
    k[:, 2] = plain[:, 2]
    ropes = [embedding] * 5
    ropes[2] = None
    with_ropes, _ = reload(Xkv(GEOMETRY, torch.float32, ropes), k, v)
    without, _ = reload(Xkv(GEOMETRY, torch.float32), k, v)
    assert relative_error(with_ropes, k) < 1e-6
    assert relative_error(without, k) > 1e-2


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_low_rank_is_the_best_of_its_rank(shape):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    left, right = low_rank(x, 5)
    singular = torch.linalg.svdvals(x)
    lost = (left.float() @ right.float() - x).square().sum(dim=(-1, -2))
    best = singular[:, 5:].square().sum(dim=-1)
    assert torch.allclose(lost, best, rtol=1e-3)
