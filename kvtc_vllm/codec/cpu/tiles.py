"""Which tokens of several chunks are held and multiplied together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.base import DecodedChunk
from kvtc_vllm.codec.container import Header
from kvtc_vllm.codec.cpu.rows import Elements

TILE_TOKENS = 512
"""Most tokens whose rows are held at once, apart from a single chunk's."""


@dataclass(frozen=True)
class Span:
    """Coded tokens first .. end - 1 of a chunk, at rows row .. of a tile."""

    number: int
    first: int
    end: int
    row: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.end - self.first)


def tiles(sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Numbers of (number, tokens), cut where more than `TILE_TOKENS` would be together."""
    tile: list[int] = []
    total = 0
    for number, tokens in sizes:
        if tile and total + tokens > TILE_TOKENS:
            yield tile
            tile, total = [], 0
        tile.append(number)
        total += tokens
    if tile:
        yield tile


def empty_chunk(header: Header, geometry: Geometry, dtype: torch.dtype) -> DecodedChunk:
    """Room for what a blob holds."""
    k, v = (
        torch.empty((header.tokens, geometry.num_layers, geometry.num_kv_heads, size), dtype=dtype)
        for size in (geometry.head_size, geometry.head_size_v)
    )
    return DecodedChunk(k, v, header.start)


def elements_of(x: torch.Tensor) -> Elements:
    """[T, ..] -> [T, n] as the integers of its bits; a view if x is contiguous."""
    integers = torch.uint16 if x.dtype.itemsize == 2 else torch.uint32
    flat: Elements = x.contiguous().flatten(1).view(integers).numpy()
    return flat
