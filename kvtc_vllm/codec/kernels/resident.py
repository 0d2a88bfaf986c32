"""What of an artifact stays on the device: bases and means, for rows of all layers.

Only one target ratio is resident, and its bases have a column order that suits how the codec lays
out codes. Matrix products have rows that begin at multiples of 128 bytes, as the fast tensor-core
kernels want them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from kvtc_vllm.codec.artifact import RankArtifact, SectionKey, SectionName
from kvtc_vllm.codec.entropy.unit_table import Lengths
from kvtc_vllm.codec.kernels.batches import BasisShape, Batch
from kvtc_vllm.codec.kernels.row_table import LayerPlace

COLUMNS = 64
"""Columns of a tile of codes; widths of resident matrices are multiples."""
_ALIGNMENT = 16
"""Payloads of a section begin at multiples of so many bytes, a power of two."""

Bytes = TypeVar("Bytes", int, Lengths)


@dataclass(frozen=True)
class ColumnOrder:
    """Which columns of a section's basis are resident, and where.

    sources: int64 [total width], the column of the basis that each is; -1 for zeros. width: how
    many of them all tokens have; the others are for marked tokens alone. Both are multiples of
    `COLUMNS`. unit: what coefficients are multiplied by on the device, a power of two; 1 unless
    float16 would not hold them well.
    """

    width: int
    sources: torch.Tensor
    unit: float = 1.0

    @property
    def total_width(self) -> int:
        return len(self.sources)


@dataclass(frozen=True)
class ResidentBatch:
    """Sections whose products are one launch.

    columns: of all of them in a row. shape: of each. analysis, synthesis: [G, p, total width].
    """

    keys: tuple[SectionKey, ...]
    columns: slice
    shape: BasisShape
    analysis: torch.Tensor
    synthesis: torch.Tensor

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Their part of rows [R, P]: [G, R, p], a view."""
        own = x[:, self.columns]
        return own.view(len(x), len(self.keys), self.shape.row).transpose(0, 1)


class ResidentArtifact:
    """An artifact at one target ratio as kernels take it, on one device. Thread-safe.

    sections: the artifact's, on any device. analysis, synthesis: what rows and coefficients are
    multiplied by, [p, total width] in the operand dtype: the bases in the order of `orders`, with
    the rows' weights in them where there are some; views of those of `batches`. keys: of all
    sections, in the order of the container. row: P, elements of a row, in which sections follow one
    another in the order of the batches. columns: of each section in it. mean: float32 [P].
    """

    def __init__(
        self,
        artifact: RankArtifact,
        orders: Mapping[SectionKey, ColumnOrder],
        batches: Sequence[Batch],
        device: torch.device,
        operand: torch.dtype,
    ) -> None:
        self.geometry = artifact.geometry
        self.operand = operand
        self.orders = orders
        self.device = device
        self.keys = artifact.section_keys()
        self.columns: dict[SectionKey, slice] = {}
        made: list[ResidentBatch] = []
        means: list[torch.Tensor] = []
        first = 0
        for batch in batches:
            made.append(_resident(artifact, batch, orders, first, device, operand))
            for key in batch.keys:
                self.columns[key] = slice(first, first + batch.shape.row)
                first += batch.shape.row
                means.append(artifact.sections[key].mean.float())
        self.batches = tuple(made)
        self.row = first
        self.mean = torch.cat(means).to(device)
        in_batches = [(key, batch, i) for batch in made for i, key in enumerate(batch.keys)]
        self.analysis = {key: batch.analysis[i] for key, batch, i in in_batches}
        self.synthesis = {key: batch.synthesis[i] for key, batch, i in in_batches}

    def width(self, layer_group: int, name: SectionName) -> int:
        """Columns of the section's coefficients."""
        return self.orders[layer_group, name].width

    @property
    def nbytes(self) -> int:
        """Device memory of bases and means."""
        bases = [basis for batch in self.batches for basis in (batch.analysis, batch.synthesis)]
        # Without weights both bases are one.
        tensors = {basis.data_ptr(): basis for basis in bases}.values()
        return sum(x.nbytes for x in (*tensors, self.mean))


def _resident(
    artifact: RankArtifact,
    batch: Batch,
    orders: Mapping[SectionKey, ColumnOrder],
    first: int,
    device: torch.device,
    operand: torch.dtype,
) -> ResidentBatch:
    """first: column of a row where the batch begins."""
    analysis: list[torch.Tensor] = []
    synthesis: list[torch.Tensor] = []
    for key in batch.keys:
        section, unit = artifact.sections[key], orders[key].unit
        basis = ordered(section.basis, orders[key].sources)
        analysis.append(_scaled(basis, section.weights, unit, operand))
        inverse = None if section.weights is None else 1 / section.weights
        synthesis.append(_scaled(basis, inverse, 1 / unit, operand))
    plain = all(artifact.sections[k].weights is None and orders[k].unit == 1 for k in batch.keys)
    forth = torch.stack(analysis).to(device)
    back = forth if plain else torch.stack(synthesis).to(device)
    columns = slice(first, first + len(batch.keys) * batch.shape.row)
    return ResidentBatch(batch.keys, columns, batch.shape, forth, back)


def layer_places(artifact: RankArtifact, columns: Mapping[SectionKey, slice]) -> list[LayerPlace]:
    """Where each layer's K and V lie in a row. columns: of each section in it."""
    geometry = artifact.geometry
    places: list[LayerPlace] = []
    for group, name in artifact.section_keys():
        first = columns[group, name].start
        begin, end = geometry.layer_groups[group]
        for tensor, part in geometry.row_parts(group, name).items():
            size = (part.stop - part.start) // (end - begin)
            for layer in range(begin, end):
                table = artifact.layer_rope[layer] if tensor == "k" else None
                rope = None if table is None else artifact.ropes[table]
                column = first + part.start + (layer - begin) * size
                places.append(LayerPlace(tensor, layer, rope, column))
    return places


def padded_payload(length: Bytes) -> Bytes:
    """Bytes from a payload's place to the next one's."""
    return (length + (_ALIGNMENT - 1)) & -_ALIGNMENT


def ordered(basis: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """[p, r] -> [p, len(sources)], contiguous: column `sources[i]`, zeros where that is -1."""
    if not basis.shape[1]:
        return basis.new_zeros((len(basis), len(sources)))
    picked = basis[:, sources.clamp_min(0)]
    picked[:, sources < 0] = 0
    return picked


def _scaled(
    basis: torch.Tensor, factors: torch.Tensor | None, unit: float, operand: torch.dtype
) -> torch.Tensor:
    """The basis with its rows multiplied by float32 factors [p] and by a power of two."""
    if factors is None and unit == 1:
        return basis.to(operand)
    factors = torch.ones(len(basis)) if factors is None else factors
    return (basis.float() * (factors * unit).to(basis.device)[:, None]).to(operand)
