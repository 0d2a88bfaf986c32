"""What of an artifact stays on the device: bases, means, rotary tables, and plans as tables.

The tables of a bit plan hold all that a kernel needs to find a code or a shift: where each
coefficient group starts, and where its packed codes lie in the payload. Packed codes are cut into
tiles of equal size, listed over all coefficient groups, so that one launch covers groups of 1 and
of 1024 coefficients without idle programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvtc_vllm.codec.artifact import KINDS, Kind, RankArtifact, SectionBasis
from kvtc_vllm.codec.entropy import cut_units
from kvtc_vllm.codec.kernels.paged import Rotation, rotations
from kvtc_vllm.codec.payload import (
    FP16_BYTES,
    BitPlan,
    batches,
    bit_plan,
    payload_length,
    stream_lengths,
)

TILE_BYTES = 256
"""Bytes of packed codes that one program of a kernel handles."""


@dataclass(frozen=True)
class PlanTables:
    """A bit plan for chunks of one length, resident on a device."""

    rank: int
    """Leading basis columns that the plan reads."""
    tokens: int
    """Coded tokens per chunk."""
    payload_bytes: int
    """Bytes per chunk before entropy coding."""
    has_gaps: bool
    """Whether some coefficients below `rank` are in no coefficient group."""
    groups: torch.Tensor
    """Coefficient groups in stored order, int64 [n, 4]: first coefficient, size, type id, offset
    of the packed codes in the payload."""
    tiles: torch.Tensor
    """int32 [m, 2]: number of the coefficient group, first byte of its packed codes."""
    unit_lengths: tuple[int, ...]
    """Raw bytes of the entropy coder's units, in order; a unit never crosses the end of a stream
    (see `payload`)."""

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    @classmethod
    def build(cls, plan: BitPlan, tokens: int, device: torch.device) -> PlanTables:
        """Tables of `plan` for chunks of `tokens` coded tokens."""
        groups: list[tuple[int, int, int, int]] = []
        tiles: list[tuple[int, int]] = []
        offset = 2 * FP16_BYTES * len(plan.groups) * tokens
        for batch in batches(plan):
            packed_bytes = batch.packed_bytes(tokens)
            type_id = batch.quantizer.type_id
            for start in batch.starts:
                tiles += [(len(groups), first) for first in range(0, packed_bytes, TILE_BYTES)]
                groups.append((start, batch.size, type_id, offset))
                offset += packed_bytes
        return cls(
            rank=plan.rank,
            tokens=tokens,
            payload_bytes=payload_length(plan, tokens),
            has_gaps=sum(group.size for group in plan.groups) < plan.rank,
            groups=torch.tensor(groups, dtype=torch.int64).view(-1, 4).to(device),
            tiles=torch.tensor(tiles, dtype=torch.int32).view(-1, 2).to(device),
            unit_lengths=tuple(cut_units(stream_lengths(plan, tokens))),
        )


class ResidentArtifact:
    """An artifact as kernels take it, on one device.

    sections: as `TransformCodec` keeps them: bases [p, rank] in the operand dtype, float32 means
    [p]. analysis, synthesis: what rows and coefficients are multiplied by, [p, rank] in the
    operand dtype: the bases, with the rows' weights in them where there are some.
    """

    def __init__(
        self,
        artifact: RankArtifact,
        sections: Mapping[tuple[int, Kind], SectionBasis],
        device: torch.device,
    ) -> None:
        self.geometry = artifact.geometry
        self.sections = sections
        self.analysis = {key: _scaled(s, s.weights) for key, s in sections.items()}
        self.synthesis = {
            key: _scaled(s, None if s.weights is None else 1 / s.weights)
            for key, s in sections.items()
        }
        self._device = device
        self._tables: dict[tuple[int, Kind, float, int], PlanTables] = {}
        layers = artifact.geometry.num_layers
        ropes = [None if i is None else artifact.ropes[i] for i in artifact.layer_rope]
        self.rotations: dict[Kind, tuple[Rotation, ...]] = {
            "k": rotations(ropes, device),
            "v": rotations([None] * layers, device),
        }
        self.means: dict[Kind, torch.Tensor] = {
            tensor: torch.cat(
                [sections[layer_group, tensor].mean for layer_group in self.layer_groups]
            )
            for tensor in KINDS
        }

    @property
    def layer_groups(self) -> range:
        return range(len(self.geometry.layer_groups))

    def columns(self, layer_group: int, tensor: Kind) -> slice:
        """Where the layer group lies in a row of all layers."""
        first, end = self.geometry.layer_groups[layer_group]
        per_layer = self.geometry.row_size(layer_group, tensor) // (end - first)
        return slice(first * per_layer, end * per_layer)

    def tables(self, layer_group: int, tensor: Kind, ratio: float, tokens: int) -> PlanTables:
        """The section's plan for chunks of `tokens` coded tokens; made once."""
        key = (layer_group, tensor, ratio, tokens)
        if key not in self._tables:
            plan = bit_plan(self.sections[layer_group, tensor], ratio)
            self._tables[key] = PlanTables.build(plan, tokens, self._device)
        return self._tables[key]

    @property
    def nbytes(self) -> int:
        """Device memory of bases, means and rotary tables."""
        bases = [*self.analysis.values(), *self.synthesis.values()]
        bases += [section.basis for section in self.sections.values()]
        # Without weights all three are one.
        tensors = list({id(basis): basis for basis in bases}.values())
        tensors += self.means.values()
        tensors += [section.mean for section in self.sections.values()]
        tables = {id(span.rope): span.rope.cos_sin for span in self.rotations["k"] if span.rope}
        return sum(x.nbytes for x in tensors) + sum(x.nbytes for x in tables.values())


def _scaled(section: SectionBasis, factors: torch.Tensor | None) -> torch.Tensor:
    """The basis with its rows multiplied by float32 factors [p]."""
    if factors is None:
        return section.basis
    return (section.basis.float() * factors[:, None]).to(section.basis.dtype)
