"""What of an artifact stays on the device: bases, means and rotary tables.

Only one target ratio is resident, and its bases have a column order that suits how the codec lays
out codes. Matrix products have rows that begin at multiples of 128 bytes, as the fast tensor-core
kernels want them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from kvtc_vllm.codec.artifact import KINDS, Kind, RankArtifact, SectionKey, SectionName
from kvtc_vllm.codec.entropy.unit_table import Lengths
from kvtc_vllm.codec.kernels.paged import Rotation, rotations

COLUMNS = 64
"""Columns of a tile of codes; widths of resident matrices are multiples."""
_ALIGNMENT = 16
"""Payloads of a section begin at multiples of so many bytes."""

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


class ResidentArtifact:
    """An artifact at one target ratio as kernels take it, on one device. Thread-safe.

    sections: the artifact's, on any device. analysis, synthesis: what rows and coefficients are
    multiplied by, [p, total width] in the operand dtype: the bases in the order of `orders`, with
    the rows' weights in them where there are some. means: float32 [P], of a row of all layers.
    keys: of all sections, in the order of the container.
    """

    def __init__(
        self,
        artifact: RankArtifact,
        orders: Mapping[SectionKey, ColumnOrder],
        device: torch.device,
        operand: torch.dtype,
    ) -> None:
        self.geometry = artifact.geometry
        self.operand = operand
        self.orders = orders
        self.device = device
        self.analysis: dict[SectionKey, torch.Tensor] = {}
        self.synthesis: dict[SectionKey, torch.Tensor] = {}
        for key, section in artifact.sections.items():
            basis = ordered(section.basis, orders[key].sources)
            unit, weights = orders[key].unit, section.weights
            self.analysis[key] = _scaled(basis, weights, unit, operand).to(device)
            inverse = None if weights is None else 1 / weights
            self.synthesis[key] = (
                self.analysis[key]
                if inverse is None and unit == 1
                else _scaled(basis, inverse, 1 / unit, operand).to(device)
            )
        layers = artifact.geometry.num_layers
        ropes = [None if i is None else artifact.ropes[i] for i in artifact.layer_rope]
        self.rotations: dict[Kind, tuple[Rotation, ...]] = {
            "k": rotations(ropes, device),
            "v": rotations([None] * layers, device),
        }
        self.keys = artifact.section_keys()
        means: dict[Kind, list[torch.Tensor]] = {tensor: [] for tensor in KINDS}
        for key in self.keys:
            for tensor, part in self.geometry.row_parts(*key).items():
                means[tensor].append(artifact.sections[key].mean[part].float())
        self.means: Mapping[Kind, torch.Tensor] = {
            tensor: torch.cat(parts).to(device) for tensor, parts in means.items()
        }

    @property
    def layer_groups(self) -> range:
        return range(len(self.geometry.layer_groups))

    def section_rows(self, key: SectionKey, rows: Mapping[Kind, torch.Tensor]) -> torch.Tensor:
        """Rows of a section, [R, p]: a view, or of a pair a copy.

        rows: K and V [R, P] of all layers.
        """
        group, name = key
        tensors = self.geometry.row_parts(group, name)
        parts = [rows[tensor][:, self.columns(group, tensor)] for tensor in tensors]
        return parts[0] if len(parts) == 1 else joined(parts)

    def joined_bytes(self, tokens: int) -> int:
        """Device memory that `section_rows` takes for so many tokens, at most."""
        pairs = [self.geometry.row_size(*key) for key in self.keys if key[1] == "kv"]
        return tokens * max(pairs, default=0) * self.operand.itemsize

    def columns(self, layer_group: int, tensor: Kind) -> slice:
        """Where the layer group lies in a row of all layers."""
        first, end = self.geometry.layer_groups[layer_group]
        per_layer = self.geometry.row_size(layer_group, tensor) // (end - first)
        return slice(first * per_layer, end * per_layer)

    def width(self, layer_group: int, name: SectionName) -> int:
        """Columns of the section's coefficients."""
        return self.orders[layer_group, name].width

    @property
    def widest(self) -> int:
        """Largest `width` of a section."""
        return max(order.width for order in self.orders.values())

    @property
    def longest_row(self) -> int:
        """Most elements of a section's row."""
        return max(self.geometry.row_size(*key) for key in self.keys)

    @property
    def nbytes(self) -> int:
        """Device memory of bases, means and rotary tables."""
        # Without weights both bases are one.
        bases = [*self.analysis.values(), *self.synthesis.values()]
        tensors = list({id(basis): basis for basis in bases}.values())
        tensors += self.means.values()
        tables = {id(span.rope): span.rope.cos_sin for span in self.rotations["k"] if span.rope}
        return sum(x.nbytes for x in tensors) + sum(x.nbytes for x in tables.values())


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """K and V [R, pieces of p] -> rows of a pair [R, p], a copy.

    Two products whose results are added in float32 would do without it. But not every torch adds
    a product of float16 operands to float32, and the sum would be another one than the codec
    without kernels has.
    """
    return torch.cat(list(parts), dim=1)


def padded_payload(length: Bytes) -> Bytes:
    """Bytes from a payload's place to the next one's."""
    return -(-length // _ALIGNMENT) * _ALIGNMENT


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
