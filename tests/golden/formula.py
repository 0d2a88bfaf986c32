"""An artifact and chunks made by formula: no random state, and exact arithmetic.

The basis is a permutation, the rotary table turns by quarters, means and
values are small multiples of powers of two. Every product and sum of the
forward transform is then exact in float32 in any order, so the codes of a
chunk do not depend on the BLAS, its threads or its version, and a golden file
pins them bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvtc_vllm.codec.artifact import (
    APART,
    PAIRED,
    Geometry,
    Kind,
    RankArtifact,
    SectionBasis,
    SectionKey,
    SectionName,
)
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.payload import BitPlan, CoefficientGroup
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.codec.v2.codec import Kvtc2Codec
from kvtc_vllm.codec.v2.plan import StepPlan

GEOMETRY = Geometry(
    num_layers=3, num_kv_heads=1, head_size=8, head_size_v=4, layer_groups=((0, 2), (2, 3))
)
FINGERPRINT = bytes(range(0x10, 0x20))
IDENTITY = bytes(range(0x20, 0x30))
MAX_POSITIONS = 256
ROTARY_DIM = 4

SCALES: dict[Kind, tuple[float, ...]] = {"k": (0.5, 2.0, 1.0), "v": (0.25, 4.0, 1.0)}
"""Of the layers of an fp8 cache."""

# Every type and several sizes, gaps, groups out of stored order, one empty plan.
PLANS: dict[SectionKey, dict[float, tuple[tuple[int, int, str], ...]]] = {
    (0, "k"): {
        4.0: ((0, 1, "int2"), (1, 1, "fp8"), (2, 4, "int4"), (7, 4, "int2"), (11, 4, "int4")),
        16.0: ((0, 3, "int2"),),
    },
    (0, "v"): {4.0: ((0, 2, "int4"), (4, 3, "int2")), 16.0: ((1, 1, "int4"),)},
    (1, "k"): {4.0: ((0, 1, "int4"), (1, 5, "fp8")), 16.0: ((2, 2, "fp8"),)},
    (1, "v"): {4.0: ((0, 4, "fp8"),), 16.0: ()},
}


def quarter_turns() -> torch.Tensor:
    """cat(cos, sin) of position * (pair + 1) quarter turns: [256, 4], entries -1, 0, 1."""
    turns = torch.arange(MAX_POSITIONS)[:, None] * torch.arange(1, ROTARY_DIM // 2 + 1) % 4
    cos = torch.tensor([1.0, 0.0, -1.0, 0.0])[turns]
    sin = torch.tensor([0.0, 1.0, 0.0, -1.0])[turns]
    return torch.cat((cos, sin), dim=-1)


def section(group: int, name: SectionName) -> SectionBasis:
    p = GEOMETRY.row_size(group, name)
    order = torch.arange(p) * 5 % p  # a permutation: 5 divides no row size
    plans = {
        ratio: BitPlan(ratio, tuple(CoefficientGroup(*g) for g in groups), 0.0)
        for ratio, groups in PLANS.get((group, name), {}).items()
    }
    return SectionBasis(
        mean=torch.arange(p) % 7 / 4 - 0.75,
        basis=torch.eye(p)[:, order].to(torch.float16),
        plans=plans,
    )


def artifact(scaled: bool = False, section_names: tuple[SectionName, ...] = APART) -> RankArtifact:
    return RankArtifact(
        geometry=GEOMETRY,
        sections={
            (group, name): section(group, name) for group in (0, 1) for name in section_names
        },
        ropes=(Rope(quarter_turns()), Rope(quarter_turns(), neox=False)),
        layer_rope=(0, 1, None),
        fingerprint=FINGERPRINT,
        scales={kind: torch.tensor(values) for kind, values in SCALES.items()} if scaled else None,
    )


STEPS: dict[SectionKey, dict[float, tuple[float, int, int]]] = {
    (0, "k"): {4.0: (1 / 16, 13, 3), 16.0: (2.0, 3, 5)},
    (0, "v"): {4.0: (1 / 2, 8, 0), 16.0: (1.0, 1, 0)},
    (1, "k"): {4.0: (1 / 4, 6, 1), 16.0: (1.0, 2, 4)},
    (1, "v"): {4.0: (1 / 32, 3, 1), 16.0: (1.0, 0, 2)},
    (0, "kv"): {4.0: (1 / 16, 17, 4), 16.0: (2.0, 4, 5)},
    (1, "kv"): {4.0: (1 / 4, 9, 3), 16.0: (1.0, 0, 3)},
}
"""Of codec 2: step, number of coefficients, and of those that marked tokens have beyond. One plan
of V and one of a pair are empty."""
RULE = SinkRule(layers=(0, 2), threshold=1.6, max_share=0.2)
_ROUNDING = ((0.75, 0.25), (0.5, 0.5), (0.625, 0.375))


def step_plan(step: float, rank: int, beyond: int) -> StepPlan:
    """Three classes in turn, one of each width; values a little below what levels would be."""
    levels = torch.arange(1.0, 6.0)
    return StepPlan(
        step=step,
        classes=(torch.arange(rank) * 2 % 3).to(torch.uint8),
        widths=torch.tensor([2, 4, 8], dtype=torch.uint8),
        values=step * (levels - torch.arange(3.0)[:, None] / 8),
        rounding=torch.tensor(_ROUNDING),
        sink_gain=4.0,
        token_bytes=100.0,
        expected_error=0.0,
        beyond=step_plan(step, beyond, 0) if beyond else None,
    )


def artifact2(scaled: bool = False, paired: bool = False) -> RankArtifact:
    base = artifact(scaled, PAIRED if paired else APART)
    sections = {
        key: replace(part, plans={r: step_plan(*plan) for r, plan in STEPS[key].items()})
        for key, part in base.sections.items()
    }
    return replace(base, sections=sections, codec="kvtc2", sink_rule=RULE)


def chunk(tokens: int, start: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V with values n / 8, |n| < 100: exact in bfloat16, rounded to fp8."""

    def values(size: int, factor: int) -> torch.Tensor:
        shape = (tokens, GEOMETRY.num_layers, GEOMETRY.num_kv_heads, size)
        index = torch.arange(start * 96, start * 96 + tokens * 3 * size).view(shape)
        spread = index * factor % 97 * (index * 29 % 11) // 10 - 30
        return (spread / 8).to(dtype)

    return values(GEOMETRY.head_size, 53), values(GEOMETRY.head_size_v, 61)


@dataclass(frozen=True)
class Golden:
    """One committed blob: `<name>.kvtc`, with its contents in `<name>.npz`."""

    name: str
    codec: str
    dtype: torch.dtype
    ratio: float
    start: int
    tokens: int
    paired: bool = False

    @property
    def scaled(self) -> bool:
        """Whether the cache has scales."""
        return self.codec != "raw" and self.dtype.itemsize == 1

    def make_codec(self) -> ChunkCodec:
        if self.codec == "raw":
            return RawCodec(GEOMETRY, self.dtype, IDENTITY)
        codec = Kvtc2Codec if self.codec == "kvtc2" else KvtcCodec
        return codec(self.make_artifact(), self.ratio, self.dtype, IDENTITY)

    def make_artifact(self) -> RankArtifact:
        """Of codec 1 where the codec is raw, which needs none."""
        if self.codec == "kvtc2":
            return artifact2(self.scaled, self.paired)
        return artifact(self.scaled)

    def make_chunk(self) -> tuple[torch.Tensor, torch.Tensor]:
        return chunk(self.tokens, self.start, self.dtype)


GOLDEN = (
    Golden("v1-raw-bf16", "raw", torch.bfloat16, 0.0, 7, 3),
    Golden("v1-kvtc-fp32-with-sinks", "kvtc", torch.float32, 4.0, 0, 12),
    Golden("v1-kvtc-bf16-two-sinks", "kvtc", torch.bfloat16, 4.0, 2, 5),
    Golden("v1-kvtc-bf16-only-sinks", "kvtc", torch.bfloat16, 4.0, 1, 2),
    Golden("v1-kvtc-fp16-one-token", "kvtc", torch.float16, 4.0, 40, 1),
    Golden("v1-kvtc-fp16-empty-plan", "kvtc", torch.float16, 16.0, 64, 9),
    Golden("v1-kvtc-bf16-long", "kvtc", torch.bfloat16, 4.0, 128, 100),
    Golden("v1-raw-e5m2", "raw", torch.float8_e5m2, 0.0, 3, 2),
    Golden("v1-kvtc-e4m3-with-sinks", "kvtc", torch.float8_e4m3fn, 4.0, 0, 12),
    Golden("v1-kvtc-e5m2-two-sinks", "kvtc", torch.float8_e5m2, 4.0, 2, 5),
    Golden("v1-kvtc2-fp32-with-sinks", "kvtc2", torch.float32, 4.0, 0, 12),
    Golden("v1-kvtc2-bf16-two-sinks", "kvtc2", torch.bfloat16, 4.0, 2, 5),
    Golden("v1-kvtc2-bf16-only-sinks", "kvtc2", torch.bfloat16, 4.0, 1, 2),
    Golden("v1-kvtc2-fp16-one-token", "kvtc2", torch.float16, 4.0, 40, 1),
    Golden("v1-kvtc2-fp16-empty-plan", "kvtc2", torch.float16, 16.0, 64, 9),
    Golden("v1-kvtc2-bf16-long", "kvtc2", torch.bfloat16, 4.0, 128, 100),
    Golden("v1-kvtc2-e4m3-with-sinks", "kvtc2", torch.float8_e4m3fn, 4.0, 0, 12),
    Golden("v1-kvtc2-pair-fp32-with-sinks", "kvtc2", torch.float32, 4.0, 0, 12, True),
    Golden("v1-kvtc2-pair-fp16-empty-plan", "kvtc2", torch.float16, 16.0, 64, 9, True),
    Golden("v1-kvtc2-pair-bf16-long", "kvtc2", torch.bfloat16, 4.0, 128, 100, True),
    Golden("v1-kvtc2-pair-e4m3-with-sinks", "kvtc2", torch.float8_e4m3fn, 4.0, 0, 12, True),
)
