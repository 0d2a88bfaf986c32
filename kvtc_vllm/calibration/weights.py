"""What rows are weighted by: roots of sensitivities.

PCA and bit allocation minimise squared error, as if an error of one cost the same in every layer.
It does not: mean squared gradients of a continuation differ between layers by a factor of
hundreds. Rows multiplied by the square root of those gradients have errors that do cost the same,
in K as in V, so that all layers compete for one budget of bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from kvtc_vllm.calibration.sensitivity import Average, Sensitivity
from kvtc_vllm.codec.artifact import Geometry, Kind, SectionName
from kvtc_vllm.codec.errors import ArtifactError

Tokens = Literal["all", "ordinary"]
Metric = Literal["layer", "head"]

LEAST_WEIGHT = 0.02
"""Nothing is weighted less than this, the root mean square of all weights being 1.

Below it a layer hardly counts. A layer that the sample never reached would have a weight of
0, which cannot be undone."""


def finer_steps(sensitivity: Sensitivity) -> float | None:
    """How much finer the steps of sinks should be than those of ordinary tokens.

    The root of how much more an error in them costs: errors then cost the same in both. None if
    sensitivities were measured without telling sinks, or the model has none.
    """
    marked = sensitivity.marked
    if marked is None or not 0 < marked.share < 1 or not 0 < marked.energy < 1:
        return None
    of_sinks = marked.energy / marked.share
    of_others = (1 - marked.energy) / (1 - marked.share)
    return max(1.0, math.sqrt(of_sinks / of_others))


@dataclass(frozen=True)
class RowWeights:
    """Weights of the rows of one rank.

    sensitivity: what they are made of.
    tokens: "all", or "ordinary": attention sinks are left out; a model that has none has only
    ordinary ones.
    metric: "layer": one weight per layer; "head": one per layer and KV head.
    heads: of all ranks' KV heads, those of the rank; None: all. Weights of a layer do not depend
    on it.

    Raises ArtifactError for the metric "head" if the rank's heads were not told apart.
    """

    sensitivity: Sensitivity
    tokens: Tokens = "all"
    metric: Metric = "layer"
    heads: range | None = None

    def __post_init__(self) -> None:
        told_apart = min(map(len, (*self.average.keys, *self.average.values)))
        if self.metric == "head" and self.heads is not None and self.heads.stop > told_apart:
            raise ArtifactError(
                f"--sensitivity-metric head: this sensitivity, by {self.sensitivity.method}, has "
                "one number per layer; give --sensitivity-metric layer, or measure with "
                "--sensitivity gradient"
            )

    @property
    def average(self) -> Average:
        """Of the tokens that count."""
        ordinary = self.sensitivity.ordinary
        return self.sensitivity.all_tokens if self.tokens == "all" or ordinary is None else ordinary

    def of_layers(self) -> dict[Kind, torch.Tensor]:
        """Root mean square weight per layer, over all heads of all ranks: float32 [L]."""
        return {kind: w.square().mean(dim=1).sqrt() for kind, w in self._all().items()}

    def of_heads(self) -> dict[Kind, torch.Tensor]:
        """Weights per layer and head of the rank: float32 [L, H], or [L, 1] for all heads alike.

        Mean square of all ranks' weights is 1, `LEAST_WEIGHT` aside. The common factor changes no
        error that anything is compared by, and keeps coefficients in the range of float16.
        """
        weights = self._all()
        if self.metric == "layer" or self.heads is None:
            return weights
        return {kind: w[:, self.heads.start : self.heads.stop] for kind, w in weights.items()}

    def of_row(self, geometry: Geometry, group: int, name: SectionName) -> torch.Tensor:
        """Weights of the elements of a row of a layer group: float32 [p]."""
        first, end = geometry.layer_groups[group]
        parts = []
        for kind in geometry.row_parts(group, name):
            weights = self.of_heads()[kind][first:end].expand(-1, geometry.num_kv_heads)
            size = geometry.head_size if kind == "k" else geometry.head_size_v
            parts.append(weights.flatten().repeat_interleave(size))
        return torch.cat(parts)

    def _all(self) -> dict[Kind, torch.Tensor]:
        kinds: tuple[tuple[Kind, tuple[tuple[float, ...], ...]], ...] = (
            ("k", self.average.keys),
            ("v", self.average.values),
        )
        squares = {kind: torch.tensor(numbers, dtype=torch.float64) for kind, numbers in kinds}
        if self.metric == "layer":
            squares = {kind: numbers.mean(dim=1, keepdim=True) for kind, numbers in squares.items()}
        mean = torch.cat(list(squares.values())).mean()
        return {
            kind: (numbers / mean).sqrt().clamp_min(LEAST_WEIGHT).float()
            for kind, numbers in squares.items()
        }
