"""Chunks that kernels work on: what a caller tells of them, and how their rows lie.

One launch takes chunks of different lengths: the one with the sinks, whose coded part is shorter,
goes with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch

_SHARE = 4
"""Chunks that a thread takes at a time: handing one over costs as much as a tenth of its work."""


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
class RowLayout:
    """How the coded rows of several chunks lie: chunk after chunk.

    members: the chunks' numbers in what the caller gave; chunks without coded tokens are left
    out. tokens: coded tokens of each.
    """

    members: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, coded: Sequence[int]) -> RowLayout:
        """Of chunks with these numbers of coded tokens."""
        members = tuple(index for index, tokens in enumerate(coded) if tokens)
        return cls(members, tuple(coded[index] for index in members))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The different numbers of coded tokens, ascending."""
        return tuple(sorted(set(self.tokens)))

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        """Where each chunk's rows begin, and at the end where they all end."""
        return tuple(accumulate(self.tokens, initial=0))

    @property
    def num_rows(self) -> int:
        return self.first_rows[-1]

    @cached_property
    def table(self) -> torch.Tensor:
        """What kernels read of each chunk, int64 [chunks, 3] on the host: first row, tokens, and
        which of `lengths` the tokens are."""
        rows = [
            (first, tokens, self.lengths.index(tokens))
            for first, tokens in zip(self.first_rows, self.tokens, strict=False)
        ]
        return torch.tensor(rows, dtype=torch.int64).view(-1, 3)

    def part(self, places: slice) -> RowLayout:
        """Some of the chunks, by their places among the members. Rows are numbered anew."""
        return RowLayout(self.members[places], self.tokens[places])

    def chosen(self, places: Sequence[int]) -> RowLayout:
        """As `part`, of any places."""
        return RowLayout(
            tuple(self.members[place] for place in places),
            tuple(self.tokens[place] for place in places),
        )

    def in_row_order(self, part: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Concatenate part(chunk), int64 [coded tokens of the chunk]."""
        parts = [part(index) for index in self.members]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def shares(count: int) -> list[range]:
    """0 .. count - 1 in parts for threads: a small one to begin with, and then few."""
    first = [range(min(count, 1))]
    return first + [range(i, min(i + _SHARE, count)) for i in range(1, count, _SHARE)]


def waves(count: int, first: int, most: int) -> list[slice]:
    """0 .. count - 1 in parts of `first`, twice as many, and so on up to `most`.

    A small one to begin with: nothing else runs while the host prepares it.
    """
    found: list[slice] = []
    done, size = 0, min(first, most)
    while done < count:
        found.append(slice(done, min(done + size, count)))
        done += size
        size = min(2 * size, most)
    return found


def even_steps(weights: Sequence[int], limit: int) -> list[slice]:
    """As `steps`, and none much lighter than the others, if that takes no more of them."""
    found = steps(weights, limit)
    if len(found) < 2:
        return found
    even = steps(weights, min(limit, -(-sum(weights) // len(found)) + max(weights)))
    return even if len(even) == len(found) else found


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
