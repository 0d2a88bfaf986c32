"""Finding a model's floating attention sinks in captured rows.

Where a model has such sinks, the norm of their values collapses in some layers, so the density of
its logarithm has a second mode far below the first. Layers that show it are taken together: the
mean over them parts the two modes more widely than any of them does, and the rule's threshold lies
in the valley between. Where no layer shows it, there is no rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from kvtc_vllm.codec.artifact import Geometry, Kind
from kvtc_vllm.codec.sink_rule import SinkRule

FIRST_POSITIONS = 4
"""Of a document; left out of the fit. A model's first token is a sink of its own, told by its
place."""

COLLAPSE = 1.0
"""A second mode lies at least this many nats below the first: at 37 % of its norm."""

VALLEY = 1 / 3
"""Density in the valley over that of the lower mode, at most. Else it is a tail, not a mode."""

LEAST_TOKENS = 16
"""Of a lower mode, at least; fewer say nothing about where it ends."""

_ROUNDS = 3
_BLOCK_BYTES = 64 * 2**20
_STEP = 0.02
_BANDWIDTH = 0.08


class ValueRows(Protocol):
    """What is read of `kvtc_vllm.calibration.rows.CapturedRows`."""

    geometry: Geometry
    positions: torch.Tensor
    docs: torch.Tensor
    heldout: torch.Tensor

    def cache_rows(self, kind: Kind, index: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """K or V of the indexed tokens, layers first .. end - 1, as in the cache: [n, l, H, D]."""
        ...


@dataclass(frozen=True)
class SinkFit:
    """A rule and how well it parts sinks from other tokens.

    rule: of the rank whose heads were seen.
    separation: nats between both modes of the mean log norm.
    valley: density at the threshold over that of the lower mode.
    train_share, heldout_share: of the tokens, how many lie below the threshold; the rule's
    `max_share` of a chunk is not applied.
    documents: share of the documents in which one does.
    """

    rule: SinkRule
    separation: float
    valley: float
    train_share: float
    heldout_share: float
    documents: float


@dataclass(frozen=True)
class Modes:
    """Two modes of a density. lower, threshold: places; valley: see `SinkFit`."""

    lower: float
    threshold: float
    valley: float


def fit_sinks(source: ValueRows, *, max_share: float = 0.05) -> SinkFit | None:
    """The rule that training rows show; None if they show no second mode.

    max_share: no more of the tokens may lie in the lower mode; also the rule's. Reads V of all
    layers once, in blocks.
    """
    index = (source.positions >= FIRST_POSITIONS).nonzero().flatten()
    norms = log_norms(source, index)
    training = ~source.heldout[index]
    medians = norms[training].median(dim=0).values if bool(training.any()) else norms.new_zeros(0)
    found = find_layers(norms[training] - medians, max_share) if len(medians) else None
    if found is None:
        return None
    layers, modes = found
    chosen = torch.tensor(layers)
    typical = float(medians[chosen].mean())
    rule = SinkRule(layers, typical + modes.threshold, max_share)
    marked = norms[:, chosen].mean(dim=1) < rule.threshold
    docs = source.docs[index]
    return SinkFit(
        rule=rule,
        separation=-modes.lower,
        valley=modes.valley,
        train_share=float(marked[training].double().mean()),
        heldout_share=float(marked[~training].double().mean()) if not bool(training.all()) else 0.0,
        documents=len(docs[marked].unique()) / len(docs.unique()),
    )


def log_norms(source: ValueRows, index: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of the norm of V per layer, over the rank's heads: float32 [n, L]."""
    geometry = source.geometry
    row_bytes = 4 * geometry.num_layers * geometry.num_kv_heads * geometry.head_size_v
    each = [SinkRule((layer,), 0.0) for layer in range(geometry.num_layers)]
    found = torch.empty(len(index), geometry.num_layers)
    done = 0
    for part in index.split(max(1, _BLOCK_BYTES // row_bytes)):
        values = source.cache_rows("v", part, 0, geometry.num_layers)
        for layer, rule in enumerate(each):
            found[done : done + len(part), layer] = rule.measure(values)
        done += len(part)
    return found


def find_layers(deviations: torch.Tensor, max_share: float) -> tuple[tuple[int, ...], Modes] | None:
    """Layers that show the sinks, and the modes of the mean over them; None if none does.

    deviations: float32 [n, L], log norms less their layer's median.
    """
    layers = [
        layer
        for layer in range(deviations.shape[1])
        if two_modes(deviations[:, layer], max_share) is not None
    ]
    settled: tuple[tuple[int, ...], Modes] | None = None
    for _ in range(_ROUNDS):
        if not layers:
            return None
        mean = deviations[:, layers].mean(dim=1)
        modes = two_modes(mean, max_share)
        if modes is None:
            return None
        settled = tuple(layers), modes
        # A layer may show them too faintly to tell them by itself, or show something else.
        sinks = deviations[mean < modes.threshold].median(dim=0).values
        again = (sinks < -COLLAPSE).nonzero().flatten().tolist()
        if again == layers:
            break
        layers = again
    return settled


def two_modes(values: torch.Tensor, max_share: float) -> Modes | None:
    """The lower mode of a distribution about 0, and where it ends; None if it has one mode.

    values: float [n]. max_share: of the values, below the threshold at most.
    """
    lowest = float(values.min())
    if lowest > -COLLAPSE:
        return None
    places, density = _density(values, lowest)
    best: Modes | None = None
    height = 0.0
    inner = density[1:-1]
    peaks = ((inner >= density[:-2]) & (inner > density[2:]) & (places[1:-1] < -COLLAPSE)).nonzero()
    for peak in (peaks.flatten() + 1).tolist():
        between = density[peak:]
        bottom = float(between.min())
        top = float(density[peak])
        # An empty valley has no single lowest place: its middle.
        flat = (between <= bottom + 0.02 * top).nonzero().flatten()
        at = peak + int(flat[len(flat) // 2])
        modes = Modes(float(places[peak]), float(places[at]), bottom / top)
        count = int((values < modes.threshold).sum())
        if (
            top > height
            and modes.valley <= VALLEY
            and LEAST_TOKENS <= count <= max_share * len(values)
        ):
            best, height = modes, top
    return best


def _density(values: torch.Tensor, lowest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Places from below the lowest value up to 0, and a smoothed density there: float64 [m]."""
    margin = 4 * _BANDWIDTH
    count = math.ceil((margin - lowest) / _STEP) + 1
    edges = lowest - margin + _STEP * torch.arange(count + 1, dtype=torch.float64)
    counted = torch.histogram(values.double(), edges).hist
    reach = math.ceil(margin / _STEP)
    offsets = _STEP * torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / _BANDWIDTH).square())
    smooth = torch.nn.functional.conv1d(
        counted.view(1, 1, -1), (kernel / kernel.sum()).view(1, 1, -1), padding=reach
    ).flatten()
    places = (edges[:-1] + edges[1:]) / 2
    below = places < 0
    return places[below], smooth[below]
