"""In-memory form of one calibration artifact, for one tensor-parallel rank.

These are plain values: what `ChunkCodec` needs and nothing else. Their files are
`kvtc_vllm.artifact`; fitting them is `kvtc_vllm.calibration.fit`.

A *row* is one token position: K (or V) of all KV heads of the layers of one
layer group on one rank, flattened in C order [layer, head, dim]; its length
is p. K rows are pre-RoPE. A row of a *pair* is that of K followed by that of V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.section_coder import SectionCoder
from kvtc_vllm.codec.sink_rule import SinkRule

Kind = Literal["k", "v"]
"""Which tensor: K or V."""
KINDS: tuple[Kind, Kind] = ("k", "v")
SectionName = Literal["k", "v", "kv"]
"""What the rows of a section are: K, V, or both as a pair."""
APART: tuple[SectionName, ...] = ("k", "v")
"""The sections of a layer group whose K and V have a basis each."""
PAIRED: tuple[SectionName, ...] = ("kv",)
"""The one of a layer group whose K and V share a basis."""
SectionKey = tuple[int, SectionName]
"""Layer group and name."""


@dataclass(frozen=True)
class Geometry:
    """Shape of the KV cache on one rank; in JSON it has the same five fields.

    num_layers: of the whole model.
    num_kv_heads: per layer, of this rank.
    head_size, head_size_v: elements per head of K and of V.
    layer_groups: half-open (first, end) ranges of consecutive layers that
    together cover 0..num_layers.

    Raises ValueError for a size below 1 and for layer groups that do not cover the layers.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    layer_groups: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        sizes = (self.num_layers, self.num_kv_heads, self.head_size, self.head_size_v)
        if min(sizes) < 1:
            raise ValueError(f"geometry {sizes} has a size below 1")
        expected = 0
        for first, end in self.layer_groups:
            if first != expected or end <= first:
                raise ValueError(
                    f"layer_groups {self.layer_groups} must be consecutive, non-empty "
                    f"and cover layers 0..{self.num_layers}"
                )
            expected = end
        if expected != self.num_layers:
            raise ValueError(
                f"layer_groups {self.layer_groups} cover {expected} layers, not {self.num_layers}"
            )

    def row_size(self, group: int, name: SectionName) -> int:
        """Length p of a row of this layer group."""
        return sum(part.stop - part.start for part in self.row_parts(group, name).values())

    def row_parts(self, group: int, name: SectionName) -> dict[Kind, slice]:
        """Where K and V are in a row of this layer group, in this order."""
        first, end = self.layer_groups[group]
        parts: dict[Kind, slice] = {}
        start = 0
        for tensor in KINDS:
            if tensor in name:
                dim = self.head_size if tensor == "k" else self.head_size_v
                size = (end - first) * self.num_kv_heads * dim
                parts[tensor] = slice(start, start + size)
                start += size
        return parts

    def section_keys(self, names: Sequence[SectionName]) -> list[SectionKey]:
        """Sections of these names of every layer group, in the order of a blob."""
        return [(group, name) for group in range(len(self.layer_groups)) for name in names]

    def token_elements(self) -> int:
        """Number of K and V elements of one token over all layers."""
        return self.num_layers * self.num_kv_heads * (self.head_size + self.head_size_v)


@dataclass(frozen=True)
class SectionBasis:
    """Everything fitted for K, V or both of one layer group.

    mean: float32 [p]. basis: float16 [p, r], columns in order of falling
    variance. plans: target ratio -> how coefficients are coded at it.
    heldout_error: target ratio -> relative squared error measured on rows that
    the fit did not see, multiplied by the weights if there are any. weights:
    float32 [p], positive: rows are multiplied by them before the projection and
    divided after it, so that what a fit holds for important loses less. None: 1
    for every element.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    plans: Mapping[float, SectionCoder]
    heldout_error: dict[float, float] = field(default_factory=dict)
    weights: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Leading basis columns that some plan reads."""
        return max(plan.total_rank for plan in self.plans.values())

    def on(self, device: torch.device, operand: torch.dtype = torch.float32) -> SectionBasis:
        """The section as a codec keeps it: the columns that plans read, of type `operand`."""
        basis = self.basis[:, : self.rank].to(device, operand).contiguous()
        weights = None if self.weights is None else self.weights.to(device, torch.float32)
        mean = self.mean.to(device, torch.float32)
        return SectionBasis(mean, basis, self.plans, weights=weights)


def names_of(sections: Mapping[SectionKey, SectionBasis]) -> tuple[SectionName, ...]:
    """The sections of every layer group, told by the first group's."""
    return PAIRED if (0, "kv") in sections else APART


def check_layer_rope(
    layer_rope: Sequence[int | None], ropes: Sequence[Rope], num_layers: int
) -> None:
    """Raise ValueError unless every layer names a RoPE table that is there, or None."""
    if len(layer_rope) != num_layers:
        raise ValueError(f"layer_rope has {len(layer_rope)} entries for {num_layers} layers")
    for index in layer_rope:
        if index is not None and not 0 <= index < len(ropes):
            raise ValueError(
                f"layer_rope names table {index}, but there are {len(ropes)} RoPE tables"
            )


@dataclass(frozen=True)
class RankArtifact:
    """All sections of one rank.

    geometry: shape of the rank's cache.
    sections: (layer group, K, V or pair) -> basis and plans. Either every layer group has one of
    K and one of V, or every one has a pair.
    ropes: the distinct rotary embeddings of the model.
    layer_rope: per layer the index of its embedding in `ropes`; None for a
    layer whose keys are not rotated.
    fingerprint: 16 bytes that change whenever any number that influences
    encoded bytes changes. They do not change with RoPE tables and scales, which
    are part of the run-time identity.
    sink_tokens: first positions that are stored exactly.
    scales: of an fp8 cache, float32 [L] for K and for V: an element of the
    cache times its layer's scale is the model's value. None: 1 for every layer.
    codec: the name in `kvtc_vllm.codec.registry.CODECS` of the codec that the
    plans are of.
    sink_rule: tells the sinks beyond the first positions; None: there are none to tell.

    Raises ValueError for a `layer_rope` that does not fit the layers and `ropes`,
    and for a sink rule of layers that the model does not have.
    """

    geometry: Geometry
    sections: dict[SectionKey, SectionBasis]
    ropes: tuple[Rope, ...]
    layer_rope: tuple[int | None, ...]
    fingerprint: bytes
    sink_tokens: int = 4
    scales: Mapping[Kind, torch.Tensor] | None = None
    codec: str = "kvtc"
    sink_rule: SinkRule | None = None

    def __post_init__(self) -> None:
        check_layer_rope(self.layer_rope, self.ropes, self.geometry.num_layers)
        if self.sink_rule is not None and self.sink_rule.layers[-1] >= self.geometry.num_layers:
            raise ValueError(
                f"sink_rule names layer {self.sink_rule.layers[-1]}, but the model has "
                f"{self.geometry.num_layers} layers"
            )

    @property
    def section_names(self) -> tuple[SectionName, ...]:
        """The sections of every layer group, in the order of a blob."""
        return names_of(self.sections)

    def section_keys(self) -> list[SectionKey]:
        """All sections, in the order of a blob."""
        return self.geometry.section_keys(self.section_names)

    def ratios(self) -> tuple[float, ...]:
        """Target ratios for which every section has a plan, ascending."""
        common: set[float] | None = None
        for section in self.sections.values():
            keys = set(section.plans)
            common = keys if common is None else common & keys
        return tuple(sorted(common or ()))


def at_ratio(artifact: RankArtifact, ratio: float) -> RankArtifact:
    """The artifact with no other plan than those of `ratio`, and no column that they don't read.

    Its blobs are those of the whole artifact at that ratio.
    """
    sections: dict[SectionKey, SectionBasis] = {}
    for key, section in artifact.sections.items():
        plan = section.plans[ratio]
        errors = {r: e for r, e in section.heldout_error.items() if r == ratio}
        sections[key] = replace(
            section,
            basis=section.basis[:, : plan.total_rank].contiguous(),
            plans={ratio: plan},
            heldout_error=errors,
        )
    return replace(artifact, sections=sections)
