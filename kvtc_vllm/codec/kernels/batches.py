"""Which sections share one batched product, and how wide their matrices are then.

The host launches a product for each batch. Sections of different ranks can share one if zeros fill
the narrower bases up, which is work for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvtc_vllm.codec.artifact import SectionKey

_LAUNCH_ELEMENTS = 4 << 20
"""Zeros in bases that take as long as a launch: in a full wave of 4,096 tokens an H100 multiplies
some 85 of these a nanosecond, and a launch was seen to take 40 to 100 microseconds there."""


@dataclass(frozen=True)
class BasisShape:
    """Of a resident basis. row: elements of a row. width: columns that all tokens have. beyond:
    those of marked tokens alone."""

    row: int
    width: int
    beyond: int = 0

    @property
    def total(self) -> int:
        return self.width + self.beyond

    def covers(self, other: BasisShape) -> bool:
        """Whether another basis of such rows may be filled up to this one, at less than a launch.

        One without columns may not: that its rows are finite is looked at elsewhere.
        """
        alike = self.row == other.row and bool(self.width) == bool(other.width)
        holds = self.width >= other.width and self.beyond >= other.beyond
        return alike and holds and (self.total - other.total) * self.row <= _LAUNCH_ELEMENTS


@dataclass(frozen=True)
class Batch:
    """Sections that share a product. shape: of each, filled up."""

    keys: tuple[SectionKey, ...]
    shape: BasisShape


def batches(shapes: Mapping[SectionKey, BasisShape]) -> tuple[Batch, ...]:
    """All sections, the widest first. What begins a batch settles how far the others are filled."""

    def size(key: SectionKey) -> tuple[int, int, int]:
        return shapes[key].row, shapes[key].total, shapes[key].width

    found: list[tuple[list[SectionKey], BasisShape]] = []
    for key in sorted(shapes, key=size, reverse=True):
        own = shapes[key]
        keys = next((keys for keys, shape in found if shape.covers(own)), None)
        if keys is None:
            found.append(([key], own))
        else:
            keys.append(key)
    return tuple(Batch(tuple(keys), shape) for keys, shape in found)
