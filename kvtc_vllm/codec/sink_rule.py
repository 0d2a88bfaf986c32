"""Which tokens of a chunk are attention sinks, told by the norm of their values.

Beside the first position a model may use delimiters at arbitrary positions as attention sinks.
The norm of their values collapses in some layers, to a fifth of the usual or less, so the mean
of its logarithm over those layers has two modes. Which layers these are and where the modes part
is fitted per model and rank at calibration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

_SMALLEST_NORM = 1e-30


@dataclass(frozen=True)
class SinkRule:
    """A token is a sink if its mean log norm lies below the threshold.

    layers: the layers whose values tell, rising. threshold: natural logarithm of the norm, mean
    over these layers; norms are over all KV heads of the rank, in the model's units (an fp8 cache
    times its scales). max_share: at most this share of a chunk's tokens is marked, rounded up,
    those with the smallest norms first.

    Raises ValueError for layers that are missing, negative or not rising, a threshold that is not
    finite and a share outside (0, 1].
    """

    layers: tuple[int, ...]
    threshold: float
    max_share: float = 0.05

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False))
        if not self.layers or self.layers[0] < 0 or not rising:
            raise ValueError(f"layers {self.layers} of a sink rule must rise from 0 or above")
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold {self.threshold} of a sink rule must be finite")
        if not 0 < self.max_share <= 1:
            raise ValueError(f"max_share {self.max_share} of a sink rule must be in (0, 1]")

    def marks(self, values: torch.Tensor) -> torch.Tensor:
        """The sinks among the tokens: bool [T]. values: floating [T, L, H, Dv] of one rank."""
        return self.marked(self.measure(values))

    def most(self, tokens: int) -> int:
        """How many of so many tokens are marked at most."""
        return math.ceil(self.max_share * tokens)

    def marked(self, measure: torch.Tensor) -> torch.Tensor:
        """The sinks among tokens of this `measure`, float32 [T]: bool [T]."""
        marks = measure < self.threshold
        if int(marks.sum()) > self.most(len(measure)):
            return self._lowest(measure[None])[0]
        return marks

    def marked_in(self, measure: torch.Tensor, tokens: Sequence[int]) -> list[torch.Tensor]:
        """`marked` of chunks that lie one behind the other, with one look at all of them.

        measure: float32 [sum of tokens] on the CPU. tokens: of each chunk, at least one.
        """
        below = measure < self.threshold
        ends = list(accumulate(tokens))
        sums = below.cumsum(0)[torch.tensor(ends, dtype=torch.int64) - 1].tolist()
        found: list[torch.Tensor] = []
        crowded: dict[int, list[int]] = {}
        first = marked = 0
        for place, (end, count) in enumerate(zip(ends, sums, strict=True)):
            if count - marked > self.most(end - first):
                crowded.setdefault(end - first, []).append(place)
            found.append(below[first:end])
            first, marked = end, count
        for size, places in crowded.items():
            own = torch.stack([measure[ends[place] - size : ends[place]] for place in places])
            for place, marks in zip(places, self._lowest(own), strict=True):
                found[place] = marks
        return found

    def _lowest(self, measure: torch.Tensor) -> torch.Tensor:
        """As many as may be marked, bool [n, T] of float32 [n, T]; of equal ones the first."""
        kept = torch.argsort(measure, dim=1, stable=True)[:, : self.most(measure.shape[1])]
        return torch.zeros_like(measure, dtype=torch.bool).scatter_(1, kept, True)

    def measure(self, values: torch.Tensor) -> torch.Tensor:
        """Mean log norm of every token: float32 [T]. values: floating [T, L, H, Dv]."""
        rows = values[:, list(self.layers)].float().flatten(2)
        return self.measure_of(rows.norm(dim=-1))

    def measure_of(self, norms: torch.Tensor) -> torch.Tensor:
        """`measure` from the norms of the rule's layers: float32 [T, layers] -> float32 [T]."""
        measure: torch.Tensor = norms.clamp_min(_SMALLEST_NORM).log().mean(dim=-1)
        return measure
