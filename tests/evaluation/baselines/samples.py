"""Caches that the baselines are tested on."""

from __future__ import annotations

from functools import cache

import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.evaluation.baselines import BASELINES, Baseline
from kvtc_vllm.evaluation.baselines.fitted import FittedBaseline
from kvtc_vllm.evaluation.baselines.statistics import ModelStatistics, StatisticsTally
from tests.codec.synthetic import rope_table

GEOMETRY = Geometry(
    num_layers=5, num_kv_heads=2, head_size=64, head_size_v=32, layer_groups=((0, 5),)
)
START = 4
Cache = tuple[torch.Tensor, torch.Tensor]


def random_cache(tokens: int, dtype: torch.dtype, seed: int = 0) -> Cache:
    """Normal noise: k [T, L, H, D], v [T, L, H, Dv]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(tokens, 5, 2, size, generator=generator).to(dtype)
        for size in (GEOMETRY.head_size, GEOMETRY.head_size_v)
    )


def structured_cache(tokens: int, seed: int = 0) -> Cache:
    """What caches are like: a few directions a head, some loud channels, single outliers, noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def rows(size: int) -> torch.Tensor:
        x = torch.einsum("tlhr,lhrd->tlhd", normal(tokens, 5, 2, 3), normal(5, 2, 3, size))
        x[..., :2] *= 8.0
        x[torch.rand(x.shape, generator=generator) < 0.005] *= 6.0
        return (x + 0.3 * normal(*x.shape)).bfloat16()

    return rows(GEOMETRY.head_size), rows(GEOMETRY.head_size_v)


def rope() -> Rope:
    return Rope(rope_table(GEOMETRY.head_size, 1024, torch.float32))


def make(
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    geometry: Geometry = GEOMETRY,
    ropes=(),
    **given: float,
) -> Baseline:
    """A baseline by name and settings, with statistics of `structured_cache` if it needs some."""
    method = BASELINES[name]
    if issubclass(method, FittedBaseline):
        return method(geometry, dtype, ropes, statistics=statistics(geometry), **given)
    return method(geometry, dtype, ropes, **given)


@cache
def statistics(geometry: Geometry = GEOMETRY) -> ModelStatistics:
    """Of noise with some loud channels; two query heads per KV head."""
    generator = torch.Generator().manual_seed(1)
    heads, tokens, hidden = geometry.num_kv_heads, 400, 96

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * (
            1 + 3 * torch.rand(shape[-1], generator=generator)
        )

    tally = StatisticsTally(geometry.num_layers)
    for layer in range(geometry.num_layers):
        keys = normal(heads, tokens, geometry.head_size)
        values = normal(heads, tokens, geometry.head_size_v)
        tally.add(layer, normal(2 * heads, tokens, geometry.head_size), keys, values, keys)
    weights = (
        [normal(heads * size, hidden) for _ in range(geometry.num_layers)]
        for size in (geometry.head_size, geometry.head_size_v)
    )
    return tally.result(*weights)


def views(parts: list[bytes]) -> list[memoryview]:
    return [memoryview(part) for part in parts]


def reload(method: Baseline, k: torch.Tensor, v: torch.Tensor) -> Cache:
    """What comes back from the bytes alone, in a second instance of the method."""
    known = {"statistics": method.statistics} if isinstance(method, FittedBaseline) else {}
    second = type(method)(method.geometry, method.dtype, method.ropes, **known, **method.values)
    return second.restore(views(method.compress(k, v, START)), len(k), START)


def relative_error(restored: torch.Tensor, original: torch.Tensor) -> float:
    """Squared error as a share of the squared norm."""
    difference = restored.float() - original.float()
    return float(difference.square().sum() / original.float().square().sum())
