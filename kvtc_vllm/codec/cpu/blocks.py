"""Products that leave out the zeros of a matrix. Imports numba.

Columns of a basis may be of some layers alone: all other elements of them are 0. Of such a matrix
the elements of a row fall into parts, each with the columns that are not 0 there, or the other way
round. A block is what such a product really multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.cpu.jit import jit
from kvtc_vllm.codec.cpu.rows import Bytes, Floats, Integers

RUN = 64
"""Elements that are looked at together: a 0 alone among others is chance."""
WORTH = 0.8
"""Share of a matrix's multiplications above which blocks are not worth their copies."""
MOST_BLOCKS = 32

T = TypeVar("T", Floats, Bytes)


@dataclass(frozen=True)
class Block:
    """Columns that are 0 but in some rows. rows, columns: int64 [n, 2], (first, length) of runs of
    neighbours, rising."""

    rows: Integers
    columns: Integers

    @property
    def size(self) -> int:
        """Elements."""
        return int(self.rows[:, 1].sum() * self.columns[:, 1].sum())

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """The block of its matrix; a view where that is all of it."""
        for dim, runs in enumerate((self.rows, self.columns)):
            pieces = [matrix.narrow(dim, first, length) for first, length in runs.tolist()]
            matrix = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
        return matrix.contiguous()


def blocks_of(matrix: torch.Tensor, elements: int) -> list[Block]:
    """What of matrix [m, n] is not 0, each column in at most one block; one block of all of it if
    blocks would save little.

    elements: the dimension, 0 or 1, along which elements of a row lie; the other has coefficients.
    """
    m, n = matrix.shape
    whole = [Block(np.array([[0, m]]), np.array([[0, n]]))]
    if not matrix.numel():
        return whole
    used = matrix != 0
    along = used if elements == 0 else used.T
    size = len(along)
    padded = torch.nn.functional.pad(along, (0, 0, 0, -size % RUN))
    # [coefficients, runs of elements]
    runs = padded.reshape(-1, RUN, along.shape[1]).any(1).T.numpy()
    grouped = runs if elements == 0 else runs.T
    patterns, number = np.unique(grouped, axis=0, return_inverse=True)
    if len(patterns) > MOST_BLOCKS:
        return whole
    blocks = []
    for i, pattern in enumerate(patterns):
        if not pattern.any():
            continue
        own = number.reshape(-1) == i
        if elements == 0:
            blocks.append(Block(_runs(np.repeat(pattern, RUN)[:m]), _runs(own)))
        else:
            blocks.append(Block(_runs(pattern), _runs(np.repeat(own, RUN)[:n])))
    return blocks if sum(block.size for block in blocks) <= WORTH * m * n else whole


def by_blocks(
    blocks: Sequence[Block],
    parts: Sequence[Callable[[T, Integers], torch.Tensor]],
    rows: T,
    columns: int,
) -> torch.Tensor:
    """float32 [T, columns] from what parts make of rows [T, m], of which each takes its runs."""
    if [block.size for block in blocks] == [rows.shape[1] * columns]:
        return parts[0](rows, blocks[0].rows)
    found = np.zeros((len(rows), columns), np.float32)
    for block, part in zip(blocks, parts, strict=True):
        _put(part(rows, block.rows).numpy(), block.columns, found)
    return torch.from_numpy(found)


def _runs(used: npt.NDArray[np.bool_]) -> Integers:
    """(first, length) of the runs of True: int64 [n, 2]."""
    edges = np.flatnonzero(np.diff(np.pad(used, 1).astype(np.int8)))
    firsts, ends = edges[::2], edges[1::2]
    return np.stack((firsts, ends - firsts), axis=1).astype(np.int64)


def taken(rows: T, runs: Integers) -> T:
    """Columns of rows [T, m]; the rows themselves where that is all of them."""
    if runs.tolist() == [[0, rows.shape[1]]]:
        return rows
    out = np.empty((len(rows), int(runs[:, 1].sum())), rows.dtype)
    _take(rows, runs, out)
    return out


@jit
def _take(rows: T, runs: Integers, out: T) -> None:
    for token in range(len(rows)):
        row, own = rows[token], out[token]
        at = np.uint64(0)
        for i in range(len(runs)):
            first = np.uint64(runs[i, 0])
            length = np.uint64(runs[i, 1])
            for j in range(length):
                own[at + j] = row[first + j]
            at += length


@jit
def _put(rows: Floats, runs: Integers, out: Floats) -> None:
    """Inverse of `_take`."""
    for token in range(len(rows)):
        row, own = rows[token], out[token]
        at = np.uint64(0)
        for i in range(len(runs)):
            first = np.uint64(runs[i, 0])
            length = np.uint64(runs[i, 1])
            for j in range(length):
                own[first + j] = row[at + j]
            at += length
