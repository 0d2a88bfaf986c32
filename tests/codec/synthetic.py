"""A synthetic model for tests: correlated cache rows, and an artifact fitted on them.

Rows have a decaying spectrum in a fixed random basis, Laplace-like tails, a
mean and an energy that varies from token to token: what the codec was made
for, without a language model.

    model = SyntheticModel(num_layers=4, num_kv_heads=2, head_size=16)
    artifact = model.artifact(ratios=(8.0,))
    k, v = model.chunk(tokens=128, start=0, seed=7, dtype=torch.bfloat16)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from kvtc_vllm.codec.artifact import (
    APART,
    KINDS,
    PAIRED,
    Geometry,
    Kind,
    RankArtifact,
    SectionBasis,
    SectionKey,
    SectionName,
)
from kvtc_vllm.codec.payload import BitPlan, CoefficientGroup, decode_payload, encode_payload
from kvtc_vllm.codec.quantizers import REGISTRY, group_cost_bits
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.transform import keys_from_rows, layer_ropes

# Rough share of a group's energy that each type leaves as error; "none" leaves all of it.
_LEFT_BY_TYPE = {"int2": 0.2, "int4": 0.01, "fp8": 0.001}
_LEADING_SINGLES = 4
_FINE_COEFFICIENTS = 64


def rope_table(
    head_size: int, max_positions: int = 8192, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Plain RoPE table [max_positions, head_size] (base 10000), cat(cos, sin), in `dtype`."""
    frequencies = 10000.0 ** (-torch.arange(0, head_size, 2).double() / head_size)
    angles = torch.arange(max_positions).double()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)


def simple_plan(variances: torch.Tensor, row_size: int, ratio: float) -> BitPlan:
    """A plausible plan by greedy marginal gain: groups of 1, 16 and 64, wider types first."""
    budget = int(16 * row_size / ratio)
    rank = len(variances)
    bounds = list(range(min(_LEADING_SINGLES, rank)))
    bounds += range(len(bounds), min(_FINE_COEFFICIENTS, rank), 16)
    bounds += range(min(_FINE_COEFFICIENTS, rank), rank, 64)
    groups = list(zip(bounds, [*bounds[1:], rank], strict=True))
    steps: list[tuple[float, int, str, int]] = []
    for index, (start, end) in enumerate(groups):
        energy = float(variances[start:end].sum())
        left, cost = energy, 0
        for name, share in _LEFT_BY_TYPE.items():
            new_cost = group_cost_bits(REGISTRY[name].bits, end - start)
            gain = (left - energy * share) / (new_cost - cost)
            steps.append((gain, index, name, new_cost - cost))
            left, cost = energy * share, new_cost
    chosen: dict[int, str] = {}
    for _, index, name, cost in sorted(steps, key=lambda step: -step[0]):
        if cost > budget:
            break
        budget -= cost
        chosen[index] = name
    return BitPlan(
        ratio=ratio,
        groups=tuple(
            CoefficientGroup(groups[i][0], groups[i][1] - groups[i][0], chosen[i])
            for i in sorted(chosen)
        ),
        predicted_error=float("nan"),
    )


@dataclass(frozen=True)
class SyntheticModel:
    """Shape, rotary embedding and row statistics of a made-up model."""

    num_layers: int = 4
    num_kv_heads: int = 2
    head_size: int = 16
    head_size_v: int | None = None
    layer_groups: tuple[tuple[int, int], ...] | None = None
    sink_tokens: int = 4
    spectrum: float = 1.2
    rotated: bool = True
    max_positions: int = 8192
    geometry: Geometry = field(init=False)

    def __post_init__(self) -> None:
        geometry = Geometry(
            self.num_layers,
            self.num_kv_heads,
            self.head_size,
            self.head_size_v or self.head_size,
            self.layer_groups or ((0, self.num_layers),),
        )
        object.__setattr__(self, "geometry", geometry)

    def rows(self, count: int, group: int, name: SectionName, seed: int) -> torch.Tensor:
        """Pre-RoPE rows float32 [count, p]."""
        parts = [
            self._tensor_rows(count, group, tensor, seed)
            for tensor in self.geometry.row_parts(group, name)
        ]
        return torch.cat(parts, dim=1)

    def _tensor_rows(self, count: int, group: int, kind: Kind, seed: int) -> torch.Tensor:
        p = self.geometry.row_size(group, kind)
        basis, mean = _true_basis_and_mean(p, 1000 * group + KINDS.index(kind))
        deviation = torch.arange(1, p + 1) ** (-self.spectrum / 2)
        deviation = deviation / deviation.square().mean().sqrt()
        drawn = torch.Generator().manual_seed(7919 * (seed + 1) + 1000 * group + KINDS.index(kind))
        uniform = torch.rand(count, p, generator=drawn).clamp(1e-6, 1 - 1e-6) - 0.5
        laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs()) / 2**0.5
        energy = (0.4 * torch.randn(count, 1, generator=drawn)).exp()
        return (laplace * deviation * energy) @ basis.T + mean

    def artifact(
        self,
        ratios: tuple[float, ...] = (4.0, 8.0, 16.0),
        fit_rows: int = 4096,
        paired: bool = False,
    ) -> RankArtifact:
        """Fit mean and basis by eigh, plans by `simple_plan`.

        paired: K and V of a layer group share a basis. Plans are then to be replaced: codec 1,
        whose plans these are, has no pairs.
        """
        ropes = (Rope(rope_table(self.head_size, self.max_positions)),) if self.rotated else ()
        sections: dict[SectionKey, SectionBasis] = {
            (group, name): self._fit(group, name, ratios, fit_rows)
            for group in range(len(self.geometry.layer_groups))
            for name in (PAIRED if paired else APART)
        }
        made_of = (self, ratios, fit_rows, *(["paired"] if paired else []))
        return RankArtifact(
            geometry=self.geometry,
            sections=sections,
            ropes=ropes,
            layer_rope=((0 if self.rotated else None),) * self.num_layers,
            fingerprint=hashlib.blake2b(repr(made_of).encode(), digest_size=16).digest(),
            sink_tokens=self.sink_tokens,
        )

    def chunk(
        self, tokens: int, start: int = 0, seed: int = 0, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K post-RoPE [T, L, H, D] and V [T, L, H, Dv] of positions start .. start + T - 1."""
        artifact = self.artifact_without_fit()
        positions = torch.arange(start, start + tokens)
        heads = self.num_kv_heads
        keys, values = [], []
        for group, (first, end) in enumerate(self.geometry.layer_groups):
            ropes = layer_ropes(artifact, group)
            rows = self.rows(tokens, group, "k", seed + 1)
            keys.append(keys_from_rows(rows, ropes, positions, heads))
            rows = self.rows(tokens, group, "v", seed + 1)
            values.append(rows.view(tokens, end - first, heads, -1))
        return torch.cat(keys, dim=1).to(dtype), torch.cat(values, dim=1).to(dtype)

    def artifact_without_fit(self) -> RankArtifact:
        """Geometry and rotary embedding only."""
        ropes = (Rope(rope_table(self.head_size, self.max_positions)),) if self.rotated else ()
        layer_rope = ((0 if self.rotated else None),) * self.num_layers
        return RankArtifact(self.geometry, {}, ropes, layer_rope, bytes(16), self.sink_tokens)

    def _fit(
        self, group: int, name: SectionName, ratios: tuple[float, ...], fit_rows: int
    ) -> SectionBasis:
        rows = self.rows(fit_rows, group, name, seed=0)
        mean = rows.mean(0)
        centred = (rows - mean).double()
        variances, vectors = torch.linalg.eigh(centred.T @ centred / fit_rows)
        variances, basis = variances.flip(0), vectors.flip(1).to(torch.float16)
        plans = {}
        for ratio in ratios:
            plan = simple_plan(variances, rows.shape[1], ratio)
            error = plan_error(rows - mean, basis.float(), plan)
            plans[ratio] = BitPlan(plan.ratio, plan.groups, error)
        return SectionBasis(mean, basis, plans)


@lru_cache(maxsize=64)
def _true_basis_and_mean(p: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(p, p, generator=generator))
    return basis, torch.randn(p, generator=generator)


def plan_error(centred: torch.Tensor, basis: torch.Tensor, plan: BitPlan) -> float:
    """Relative squared error of coding centred rows [T, p] with a float32 basis and a plan."""
    payload = bytearray(b"".join(encode_payload(centred @ basis[:, : plan.rank], plan)))
    decoded = decode_payload(payload, plan, len(centred)) @ basis[:, : plan.rank].T
    return float((decoded - centred).square().sum() / centred.square().sum())


def make_artifact(
    num_layers: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 16,
    layer_groups: tuple[tuple[int, int], ...] | None = None,
    ratios: tuple[float, ...] = (4.0, 8.0, 16.0),
) -> RankArtifact:
    """Shorthand for `SyntheticModel(...).artifact(ratios)`."""
    model = SyntheticModel(num_layers, num_kv_heads, head_size, layer_groups=layer_groups)
    return model.artifact(ratios)
