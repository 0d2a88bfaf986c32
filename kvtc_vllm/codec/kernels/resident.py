"""What of an artifact stays on the device: bases, means, rotary tables, plan tables."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvtc_vllm.codec.artifact import KINDS, Kind, RankArtifact, SectionBasis
from kvtc_vllm.codec.kernels.plan_tables import PlanTables
from kvtc_vllm.codec.kernels.rotation import Rotation, rotations
from kvtc_vllm.codec.payload import bit_plan


class ResidentArtifact:
    """sections: bases [p, rank] in the operand dtype and float32 means [p], on the device.

    analysis, synthesis: what rows and coefficients are multiplied by, [p, rank] in the operand
    dtype: the bases, with the rows' weights in them where there are some.
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
            kind: torch.cat([sections[group, kind].mean for group in self.groups]) for kind in KINDS
        }

    @property
    def groups(self) -> range:
        return range(len(self.geometry.layer_groups))

    def columns(self, group: int, kind: Kind) -> slice:
        """Where the layer group lies in a row of all layers."""
        first, end = self.geometry.layer_groups[group]
        per_layer = self.geometry.row_size(group, kind) // (end - first)
        return slice(first * per_layer, end * per_layer)

    def tables(self, group: int, kind: Kind, ratio: float, tokens: int) -> PlanTables:
        """The section's plan for chunks of `tokens` coded tokens; made once."""
        key = (group, kind, ratio, tokens)
        if key not in self._tables:
            plan = bit_plan(self.sections[group, kind], ratio)
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
        tables = {id(run.rope): run.rope.cos_sin for run in self.rotations["k"] if run.rope}
        return sum(x.nbytes for x in tensors) + sum(x.nbytes for x in tables.values())


def _scaled(section: SectionBasis, factors: torch.Tensor | None) -> torch.Tensor:
    """The basis with its rows multiplied by float32 factors [p]."""
    if factors is None:
        return section.basis
    return (section.basis.float() * factors[:, None]).to(section.basis.dtype)
