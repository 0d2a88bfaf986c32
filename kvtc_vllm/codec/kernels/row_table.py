"""Where the layers of K and V lie in a row, as one launch for all of them reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from kvtc_vllm.codec.artifact import KINDS, Kind
from kvtc_vllm.codec.kernels.paged import PagedCache, PagedTensor
from kvtc_vllm.codec.rope import Rope

_LARGEST_WORD = 16
"""Bytes that a thread moves at a time, at most."""


@dataclass(frozen=True)
class LayerPlace:
    """A layer of K or of V in a row. rope: None where nothing is rotated. column: its first."""

    tensor: Kind
    layer: int
    rope: Rope | None
    column: int


@dataclass(frozen=True)
class AlikeLayers:
    """Layers that one launch covers: a kernel is compiled for all that is said here.

    like: one of their tensors, of which shape, strides and dtype count. alignment: of the addresses
    of all, in bytes. column_alignment: of their first columns, in elements. rope: one of those that
    they have, of which size, order and dtype count; None if none is rotated. unrotated: whether
    some are not. table: int64 [n, 3] on the device: address of the layer, address of its table of
    cosines and sines or 0, first column in a row. scales: float32 [n], see `PagedTensor`.
    """

    like: PagedTensor
    alignment: int
    column_alignment: int
    rope: Rope | None
    unrotated: bool
    table: torch.Tensor
    scales: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def half(self) -> int:
        """Number of rotated pairs per head."""
        return 0 if self.rope is None else self.rope.rotary_dim // 2

    @property
    def rope_alignment(self) -> int:
        """Of the tables' rows, in bytes."""
        if self.rope is None:
            return 1
        return math.gcd(_LARGEST_WORD, self.half * self.rope.cos_sin.element_size())


@dataclass(frozen=True)
class RowTable:
    """Where the layers of a paged cache lie in a row [P] of all of them.

    width: P. parts: usually one. ropes: tables on the device, to which `parts` point.
    """

    width: int
    parts: tuple[AlikeLayers, ...]
    ropes: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, cache: PagedCache, places: Sequence[LayerPlace], width: int) -> RowTable:
        """Layers that are in no place are never read or written."""
        resident = _resident(places, cache.k.device)
        alike: dict[object, list[LayerPlace]] = {}
        for place in places:
            alike.setdefault(compiled_for(cache.tensor(place.tensor)), []).append(place)
        parts = [_part(cache, own, resident) for found in alike.values() for own in _by_rope(found)]
        return cls(width, tuple(parts), tuple(rope.cos_sin for rope in resident.values()))

    @classmethod
    def exact(cls, cache: PagedCache, width: int) -> RowTable:
        """Of all layers of K and then all of V, nothing rotated."""
        places = []
        column = 0
        for tensor in KINDS:
            own = cache.tensor(tensor)
            for layer in range(own.num_layers):
                places.append(LayerPlace(tensor, layer, None, column))
                column += own.layer_elements
        return cls.of(cache, places, width)

    @property
    def nbytes(self) -> int:
        """Device memory of the rotary tables."""
        return sum(rope.nbytes for rope in self.ropes)


def _resident(places: Sequence[LayerPlace], device: torch.device) -> dict[int, Rope]:
    """Each rope on the device once, by its id."""
    return {
        id(place.rope): Rope(place.rope.cos_sin.to(device).contiguous(), place.rope.neox)
        for place in places
        if place.rope is not None
    }


def compiled_for(tensor: PagedTensor) -> object:
    """What has to be equal for one launch."""
    shape = tensor.num_heads, tensor.page_tokens, tensor.head_size
    return shape, tensor.strides, tensor.dtype, tensor.scales is None


def _by_rope(places: Sequence[LayerPlace]) -> list[list[LayerPlace]]:
    """Parted by what ropes have to have in common. Those without one go with the first."""

    def sort(place: LayerPlace) -> tuple[int, bool, str]:
        assert place.rope is not None
        return place.rope.rotary_dim, place.rope.neox, str(place.rope.cos_sin.dtype)

    rotated = sorted((place for place in places if place.rope is not None), key=sort)
    found = [list(own) for _, own in groupby(rotated, sort)] or [[]]
    found[0] += [place for place in places if place.rope is None]
    return found


def _part(
    cache: PagedCache, places: Sequence[LayerPlace], resident: Mapping[int, Rope]
) -> AlikeLayers:
    first, device = cache.tensor(places[0].tensor), cache.k.device
    rows: list[tuple[int, int, int]] = []
    for place in places:
        view = cache.tensor(place.tensor).views[place.layer]
        table = 0 if place.rope is None else resident[id(place.rope)].cos_sin.data_ptr()
        rows.append((view.data_ptr(), table, place.column))
    ropes = [resident[id(place.rope)] for place in places if place.rope is not None]
    scales = None
    if first.scales is not None:
        by_kind = {tensor: cache.tensor(tensor).scales for tensor in KINDS}
        own = [by_kind[place.tensor][place.layer] for place in places]  # type: ignore[index]
        scales = torch.stack(own)
    return AlikeLayers(
        first,
        math.gcd(_LARGEST_WORD, *(address for address, _, _ in rows)),
        math.gcd(_LARGEST_WORD, *(column for _, _, column in rows)),
        ropes[0] if ropes else None,
        len(ropes) < len(places),
        torch.tensor(rows, dtype=torch.int64).to(device),
        scales,
    )
