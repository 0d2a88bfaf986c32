"""Cache shapes of the models that figures are given for, and synthetic artifacts of that size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from benchmarks.gpu.step_plans import step_plan
from kvtc_vllm.codec.artifact import (
    APART,
    PAIRED,
    Geometry,
    RankArtifact,
    SectionBasis,
    SectionName,
)
from kvtc_vllm.codec.payload import BitPlan, CoefficientGroup
from kvtc_vllm.codec.quantizers import REGISTRY, group_cost_bits
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.section_coder import SectionCoder
from kvtc_vllm.codec.sink_rule import SinkRule

SPECTRUM = 1.25
"""Variance of component i falls as i ** -SPECTRUM."""
_LEFT_BY_TYPE = {"int2": 0.2, "int4": 0.01, "fp8": 0.001}


@dataclass(frozen=True)
class Shape:
    """KV cache of one rank."""

    layers: int
    kv_heads: int
    head_size: int
    max_positions: int = 131072

    @property
    def token_bytes(self) -> int:
        """Uncompressed bfloat16 KV of one token."""
        return self.layers * self.kv_heads * self.head_size * 2 * 2


SHAPES = {
    "llama-3.1-8b": Shape(32, 8, 128),
    "llama-3.3-70b-tp2": Shape(80, 4, 128),
    "mistral-nemo-12b": Shape(40, 8, 128),
    "tiny": Shape(4, 2, 8, 256),
}


def synthetic_artifact(
    shape: Shape,
    layers_per_group: int,
    ratios: tuple[float, ...],
    device: torch.device,
    codec: str = "kvtc",
    paired: bool = False,
) -> RankArtifact:
    """Orthonormal bases and plausible plans; layers_per_group 0 means all layers together.

    paired: K and V of a layer group share a basis.
    """
    geometry = geometry_of(shape, layers_per_group)
    sections = {}
    for group in range(len(geometry.layer_groups)):
        for name in section_names(codec, paired):
            p = geometry.row_size(group, name)
            plans = {ratio: plan_of(codec, p, ratio) for ratio in ratios}
            rank = max(plan.total_rank for plan in plans.values())
            mean = torch.linspace(-1, 1, p)
            sections[group, name] = SectionBasis(mean, cosine_basis(p, rank, device), plans)
    rope = Rope(rope_table(shape.head_size, shape.max_positions))
    return RankArtifact(
        geometry,
        sections,
        (rope,),
        (0,) * shape.layers,
        b"benchmark artif.",
        codec=codec,
        sink_rule=sink_rule_of(codec),
    )


def geometry_of(shape: Shape, layers_per_group: int) -> Geometry:
    """layers_per_group: 0 means all layers together; the last group may have fewer."""
    step = layers_per_group or shape.layers
    groups = tuple(
        (first, min(first + step, shape.layers)) for first in range(0, shape.layers, step)
    )
    return Geometry(shape.layers, shape.kv_heads, shape.head_size, shape.head_size, groups)


def section_names(codec: str, paired: bool) -> tuple[SectionName, ...]:
    """Of every layer group. Raises ValueError for pairs of a codec that has none."""
    if paired and codec != "kvtc2":
        raise ValueError(f"codec {codec!r} has a basis each for K and V, only kvtc2 may share one")
    return PAIRED if paired else APART


def plan_of(codec: str, p: int, ratio: float) -> SectionCoder:
    """How rows of p elements are coded. codec: "kvtc" or "kvtc2"."""
    return greedy_plan(p, ratio) if codec == "kvtc" else step_plan(p, ratio, SPECTRUM)


def sink_rule_of(codec: str) -> SinkRule | None:
    """Two of 128 tokens are marked, as on SmolLM2, whichever they are."""
    return None if codec == "kvtc" else SinkRule(layers=(1,), threshold=1e3, max_share=1.5 / 128)


def cosine_basis(p: int, rank: int, device: torch.device) -> torch.Tensor:
    """The first columns of an orthonormal cosine transform with random signs, float16 [p, rank]."""
    row = torch.arange(p, device=device, dtype=torch.float64).unsqueeze(1) + 0.5
    signs = torch.randint(0, 2, (p, 1), generator=torch.Generator().manual_seed(p)) * 2 - 1
    basis = torch.empty(p, rank, dtype=torch.float16, device=device)
    for first in range(0, rank, 512):
        column = torch.arange(first, min(first + 512, rank), device=device, dtype=torch.float64)
        part = torch.cos(torch.pi / p * row * column) * (2 / p) ** 0.5
        basis[:, first : first + 512] = (part * signs.to(device)).half()
    basis[:, 0] /= 2**0.5
    return basis


def deviations(p: int, rank: int, device: torch.device) -> torch.Tensor:
    """Standard deviation of each coefficient; the mean square of a row's elements is 1."""
    spectrum = torch.arange(1, p + 1, device=device, dtype=torch.float64) ** (-SPECTRUM / 2)
    return (spectrum / spectrum.square().mean().sqrt())[:rank].float()


@lru_cache(maxsize=64)
def greedy_plan(p: int, ratio: float) -> BitPlan:
    """A plausible plan: groups of 1 to 1024, wider types for the leading ones."""
    bounds = [0, 1, 2, 3, 4]
    for size, until in ((16, 64), (64, 512), (256, 4096), (1024, p)):
        bounds += range(bounds[-1] + size, min(until, p) + 1, size)
    variances = torch.arange(1, p + 1, dtype=torch.float64) ** -SPECTRUM
    totals = torch.cat((torch.zeros(1, dtype=torch.float64), variances.cumsum(0)))
    steps: list[tuple[float, int, str, int]] = []
    for index, (start, end) in enumerate(pairwise(bounds)):
        energy = float(totals[end] - totals[start])
        left, cost = energy, 0
        for name, share in _LEFT_BY_TYPE.items():
            new_cost = group_cost_bits(REGISTRY[name].bits, end - start)
            steps.append(((left - energy * share) / (new_cost - cost), index, name, new_cost))
            left, cost = energy * share, new_cost
    budget, chosen, spent = 16 * p / ratio, dict[int, str](), dict[int, int]()
    for _, index, name, cost in sorted(steps, key=lambda step: -step[0]):
        if sum(spent.values()) - spent.get(index, 0) + cost > budget:
            break
        chosen[index], spent[index] = name, cost
    groups = tuple(
        CoefficientGroup(bounds[i], bounds[i + 1] - bounds[i], chosen[i]) for i in sorted(chosen)
    )
    return BitPlan(ratio, groups, float("nan"))


def rope_table(head_size: int, max_positions: int) -> torch.Tensor:
    frequencies = 500000.0 ** (-torch.arange(0, head_size, 2).double() / head_size)
    angles = torch.arange(max_positions).double()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(torch.bfloat16)
