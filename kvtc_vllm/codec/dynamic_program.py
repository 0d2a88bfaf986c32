"""The dynamic program of bit allocation: which candidate groups leave the least error.

What it is given, and why, is `kvtc_vllm.codec.bitplan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtc_vllm.codec.payload import CoefficientGroup

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total); stage is "simulate" or "allocate"."""

FloatArray = npt.NDArray[np.float64]
Choices = npt.NDArray[np.uint8]
"""[rank + 1, columns]: the last candidate, counted from 1, of the best cut of so many coefficients
at so many units of budget; 0 drops a coefficient."""

DROP = 0


@dataclass(frozen=True)
class Candidate:
    """One (size, type) choice; `gain[start]` is the error that it removes at `start`.

    cost: in units of the table's budget.
    """

    size: int
    type: str
    cost: int
    gain: FloatArray


def fill_table(
    candidates: Sequence[Candidate],
    rank: int,
    columns: int,
    total: float,
    progress: Progress | None,
) -> tuple[Choices, FloatArray]:
    """Choices, and the least error at every budget: float64 [columns], never rising.

    candidates: those of one size by rising cost. columns: budgets 0 .. columns - 1. total: the
    error if nothing is stored. progress: called with stage "allocate". Raises ValueError for more
    than 255 candidates.
    """
    if len(candidates) > 255:
        raise ValueError(
            f"{len(candidates)} combinations of size and type; a back-pointer byte holds 255"
        )
    depth = max((c.size for c in candidates), default=1) + 1
    best = np.empty((depth, columns))
    best[0] = total
    choices = np.zeros((rank + 1, columns), dtype=np.uint8)
    trial = np.empty(columns)
    better = np.empty(columns, dtype=np.bool_)
    for end in range(1, rank + 1):
        current = best[end % depth]
        current[:] = best[(end - 1) % depth]
        for index, candidate, gain in _worthwhile(candidates, end, columns):
            width = columns - candidate.cost
            source = best[(end - candidate.size) % depth]
            np.subtract(source[:width], gain, out=trial[:width])
            target = current[candidate.cost :]
            np.less(trial[:width], target, out=better[:width])
            np.copyto(target, trial[:width], where=better[:width])
            np.copyto(choices[end, candidate.cost :], index, where=better[:width])
        if progress is not None and (end % 64 == 0 or end == rank):
            progress("allocate", end, rank)
    return choices, best[rank % depth].copy()


def _worthwhile(
    candidates: Sequence[Candidate], end: int, columns: int
) -> Iterator[tuple[int, Candidate, float]]:
    """Candidates that can improve some entry of row `end`, with their gains.

    `best` falls with the budget, so a type that gains no more than a cheaper
    one of the same size, or nothing, can never be part of the minimum.
    """
    size, largest_gain = 0, 0.0
    for index, candidate in enumerate(candidates, start=1):
        if candidate.size > end or candidate.cost >= columns:
            continue
        if candidate.size != size:
            size, largest_gain = candidate.size, 0.0
        gain = float(candidate.gain[end - size])
        if gain > largest_gain:
            largest_gain = gain
            yield index, candidate, gain


def trace_back(
    choices: Choices, candidates: Sequence[Candidate], budget: int
) -> tuple[CoefficientGroup, ...]:
    """The groups of the best cut at a budget, by rising start."""
    groups: list[CoefficientGroup] = []
    end = choices.shape[0] - 1
    while end > 0:
        choice = int(choices[end, budget])
        if choice == DROP:
            end -= 1
            continue
        candidate = candidates[choice - 1]
        end -= candidate.size
        budget -= candidate.cost
        groups.append(CoefficientGroup(start=end, size=candidate.size, type=candidate.type))
    return tuple(reversed(groups))
