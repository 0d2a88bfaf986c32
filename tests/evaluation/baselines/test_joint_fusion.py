"""Joint fusion: which blocks share a direction, and what is charged for it."""

from __future__ import annotations

import torch

from kvtc_vllm.evaluation.baselines.joint_fusion import (
    BLOCK_TOKENS,
    LEAF_BLOCKS,
    JointFusion,
    JointFusionStrict,
    fuse,
)
from tests.evaluation.baselines.samples import (
    GEOMETRY,
    START,
    random_cache,
    relative_error,
    reload,
)

LEAF = LEAF_BLOCKS * BLOCK_TOKENS


def rows(count: int, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_blocks_of_one_leaf_are_never_compared() -> None:
    same = rows(1).repeat(4, 1)
    assert len(fuse(same, same, [4], JointFusion.alike).keys) == 1 * 4
    assert len(fuse(same, same, [1, 1, 1, 1], JointFusion.alike).keys) == 1


def test_a_direction_is_the_mean_of_what_is_alike() -> None:
    left, noise = rows(1), 0.3 * rows(1, seed=1)
    right = 5 * (left + noise)
    values = rows(2, seed=2)
    fused = fuse(torch.cat((left, right)), values, [1, 1], JointFusion.alike)
    assert fused.of_block.tolist() == [0, 0]
    mean = left / left.norm() + right / right.norm()
    assert torch.allclose(fused.keys, mean / mean.norm(), atol=1e-6)
    unit = values / values.norm(dim=1, keepdim=True)
    assert torch.allclose(fused.values[0], unit.mean(dim=0), atol=1e-6)


def test_a_right_block_goes_with_the_last_that_it_is_like() -> None:
    base = rows(1)
    left = torch.cat((base + 0.1 * rows(1, seed=1), base + 0.1 * rows(1, seed=2)))
    fused = fuse(torch.cat((left, base)), rows(3), [2, 1], JointFusion.alike)
    assert fused.of_block.tolist() == [0, 1, 1]


def test_equal_runs_cost_their_norms_and_an_index() -> None:
    k, v = (x[:LEAF] for x in random_cache(LEAF, torch.bfloat16))
    twice = torch.cat((k, 2 * k)), torch.cat((v, 2 * v))
    method = JointFusion(GEOMETRY, torch.bfloat16)
    once, both = (sum(map(len, method.compress(*x, START))) for x in ((k, v), twice))
    layer = LEAF * GEOMETRY.num_kv_heads * (GEOMETRY.head_size + GEOMETRY.head_size_v) * 2
    exact = (GEOMETRY.num_layers - 1) * layer  # all but the one between the first and last two
    assert both - once - exact == LEAF_BLOCKS * 2 * 4 + (2 * LEAF_BLOCKS * 4 - LEAF_BLOCKS * 3) // 8
    for back, original in zip(reload(method, *twice), twice, strict=True):
        assert relative_error(back, original) < 1e-4


def test_the_strict_limit_looks_at_norms_too() -> None:
    one = rows(1)
    both = torch.cat((one, 2 * one))
    assert len(fuse(both, both, [1, 1], JointFusion.alike).keys) == 1
    assert len(fuse(both, both, [1, 1], JointFusionStrict.alike).keys) == 2
    near = torch.cat((one, 1.2 * one))
    assert len(fuse(near, near, [1, 1], JointFusionStrict.alike).keys) == 1
