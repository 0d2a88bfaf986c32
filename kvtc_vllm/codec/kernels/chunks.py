"""Chunks that kernels work on: what a caller tells of them, and batches of equal length.

The rows of several chunks lie batch after batch, and inside a batch chunk after chunk, so that a
batch is a [chunks * tokens, p] matrix and its payloads a [chunks, bytes] one. Full chunks make
one batch; the one with the sinks, whose coded part is shorter, makes another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class StoreChunk(Protocol):
    """A chunk to encode: whole blocks of the paged cache."""

    @property
    def block_ids(self) -> Sequence[int]:
        """Its blocks, in the order of their tokens."""
        ...

    @property
    def start(self) -> int:
        """Position of the first token."""
        ...

    @property
    def key(self) -> bytes:
        """See `ChunkCodec.encode`."""
        ...


class LoadChunk(Protocol):
    """A chunk to decode into the paged cache."""

    @property
    def block_ids(self) -> Sequence[int]:
        """Where its blocks first_block .. go; its other blocks are not wanted."""
        ...

    @property
    def first_block(self) -> int:
        """Number, inside the chunk, of the first wanted block."""
        ...

    @property
    def start(self) -> int:
        """Position of the first token that the blob must hold."""
        ...

    @property
    def key(self) -> bytes:
        """The name that the blob was written under, see `ChunkCodec.encode`."""
        ...


@dataclass(frozen=True)
class Batch:
    """Chunks with the same number of coded tokens, by their numbers in what the caller gave.

    tokens: coded tokens per chunk. members: the chunks' numbers. first_row: where their rows
    begin among those of all batches.
    """

    tokens: int
    members: tuple[int, ...]
    first_row: int

    @property
    def num_rows(self) -> int:
        return self.tokens * len(self.members)

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.num_rows)


def batches_of(coded: Sequence[int]) -> tuple[Batch, ...]:
    """Batches of chunks with the given numbers of coded tokens; chunks with none are in none."""
    by_length: dict[int, list[int]] = {}
    for index, tokens in enumerate(coded):
        if tokens:
            by_length.setdefault(tokens, []).append(index)
    batches: list[Batch] = []
    first_row = 0
    for tokens, members in by_length.items():
        batches.append(Batch(tokens, tuple(members), first_row))
        first_row += batches[-1].num_rows
    return tuple(batches)


def in_row_order(batches: Sequence[Batch], part: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Concatenate part(chunk), int64 [tokens of the chunk], in the order of the rows."""
    parts = [part(index) for batch in batches for index in batch.members]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def steps(weights: Sequence[int], limit: int) -> list[slice]:
    """Cut a sequence into slices whose weights add up to at most `limit`, or of one element."""
    found: list[slice] = []
    first = total = 0
    for index, weight in enumerate(weights):
        if index > first and total + weight > limit:
            found.append(slice(first, index))
            first, total = index, 0
        total += weight
    if first < len(weights):
        found.append(slice(first, len(weights)))
    return found
