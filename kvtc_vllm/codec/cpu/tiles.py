"""Which tokens of several chunks are held and multiplied together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TILE_TOKENS = 256
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
