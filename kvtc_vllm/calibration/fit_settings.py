"""What a fit is asked for, and what it will take: settings, ratios and ranks, memory and time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvtc_vllm.calibration.parts import TURNED
from kvtc_vllm.calibration.rows import READING_BYTES
from kvtc_vllm.calibration.solvers import (
    RANK_CAP,
    Method,
    Solver,
    device_memory,
    effective_rank,
    peak_bytes,
    predicted_seconds,
    resolve_method,
)
from kvtc_vllm.calibration.step_classes import StepSettings
from kvtc_vllm.calibration.weights import RowWeights
from kvtc_vllm.codec.artifact import APART, PAIRED, Geometry, Kind, SectionName
from kvtc_vllm.codec.bitplan import (
    GROUP_SIZES,
    WINDOW_SAMPLES,
    budget_bits,
    table_bytes,
)
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.quantizers import REGISTRY, group_cost_bits
from kvtc_vllm.codec.registry import CODECS
from kvtc_vllm.codec.v2.codec import Kvtc2Codec

_TRIAL_BYTES = 34
"""Per coefficient of a section's sample, what finding a plan of codec 2 takes; measured: 33.6."""


@dataclass(frozen=True)
class FitSettings:
    """How to fit.

    method: see `solvers`.
    rank_cap: most columns of a basis. Fewer are fitted where no plan could read them.
    sizes, window_samples: see `bitplan.allocate`.
    train_rows, heldout_rows: at most this many of each; None = all.
    simulation_rows: rows that the allocation quantises. The paper uses 32K; on
    keys of the reference model 512, 2048 and 8192 rows gave plans of the same
    held-out error to three digits, and 2048 predict it within 5 %.
    key_share: of the bits of both, those of the keys; None codes K and V at the
    same ratio, as the paper, or with weights, so that their errors cost least together.
    weights: what rows are multiplied by; None: nothing.
    device: where products, eigenproblems and simulation run.
    seed: of what is drawn.
    codec: whose artifact it is, "kvtc" or "kvtc2"; K and V of the latter are under one budget.
    steps: see there; of "kvtc2".
    protect_sinks: the artifact has the rule that tells floating sinks, if there are any and the
    codec marks them.
    paired: K and V of a layer group share a basis, of a codec that allows it; without a key share.
    parts: bases in so many, see `calibration.parts`; 1: all columns are of all layers. method is
    that of whole bases. turned: columns of all parts, over the elements of a row.

    Raises ValueError for a codec without artifacts, for pairs that it does not allow, for pairs
    with a key share, and for less than a part and a share outside 0 to 1.
    """

    method: Method = "auto"
    rank_cap: int = RANK_CAP
    sizes: tuple[int, ...] = GROUP_SIZES
    window_samples: int | None = WINDOW_SAMPLES
    train_rows: int | None = None
    heldout_rows: int | None = 8192
    simulation_rows: int = 2048
    key_share: float | None = None
    weights: RowWeights | None = None
    device: str = "cpu"
    seed: int = 0
    codec: str = KvtcCodec.name
    steps: StepSettings = field(default_factory=StepSettings)
    protect_sinks: bool = True
    paired: bool = False
    parts: int = 1
    turned: float = TURNED

    def __post_init__(self) -> None:
        fitted = [name for name, spec in CODECS.items() if spec.needs_artifact]
        if self.codec not in fitted:
            raise ValueError(f"codec {self.codec!r} has no artifacts; {', '.join(fitted)} have")
        if self.paired and not CODECS[self.codec].pairs:
            raise ValueError(f"codec {self.codec!r} has a basis each for K and V, not one")
        if self.paired and self.key_share is not None:
            raise ValueError(
                f"key share {self.key_share}: K and V that share a basis have no shares"
            )
        if self.parts < 1 or not 0 < self.turned <= 1:
            raise ValueError(f"{self.parts} parts, {self.turned:g} turned: 1 and 0 to 1 are right")

    @property
    def marks_sinks(self) -> bool:
        """Whether the artifact is given a sink rule."""
        codec = CODECS[self.codec].codec
        return self.protect_sinks and issubclass(codec, TransformCodec) and codec.marks_sinks

    @property
    def section_names(self) -> tuple[SectionName, ...]:
        """The sections of a layer group."""
        return PAIRED if self.paired else APART

    @property
    def common_budget(self) -> bool:
        """Whether the allocation divides the bits of a layer group between K and V."""
        return self.weights is not None and self.key_share is None


def own_ratio(geometry: Geometry, group: int, kind: Kind, ratio: float, share: float) -> float:
    """Ratio of K or V of a layer group, where both together have `ratio` and K `share` of the bits.

    The paper codes both at the target ratio. What a model bears differs: `kvtc eval MODEL
    --ablation keys-values` measures it at equal bytes. share: above 0, below 1. Raises
    ArtifactError if that would take K or V below 1x: more bits than the cache has.
    """
    if not 0 < share < 1:
        raise ArtifactError(f"key share {share} must be above 0 and below 1")
    both = geometry.row_size(group, "kv")
    part = share if kind == "k" else 1 - share
    own = ratio * geometry.row_size(group, kind) / (part * both)
    if own < 1:
        raise ArtifactError(
            f"a key share of {share:g} at ratio {ratio:g} gives {kind.upper()} more bits than "
            "the cache has; take a share nearer to 0.5, or leave out low ratios"
        )
    return own


def own_ratios(
    geometry: Geometry,
    group: int,
    kind: Kind,
    ratios: Sequence[float],
    settings: FitSettings,
) -> dict[float, float]:
    """Target ratio -> that of this section. Raises ArtifactError as `own_ratio` does."""
    share = settings.key_share
    if share is None:
        return {ratio: ratio for ratio in ratios}
    return {ratio: own_ratio(geometry, group, kind, ratio, share) for ratio in ratios}


def lowest_own_ratio(
    geometry: Geometry,
    group: int,
    name: SectionName,
    ratios: Sequence[float],
    settings: FitSettings,
) -> float:
    """Lowest ratio that a section may be coded at: that of all bits of both in a common budget; of
    codec 2 that of all bytes of all sections.

    Raises ArtifactError as `own_ratio` does.
    """
    if settings.marks_sinks:
        # Steps of sinks are finer than those of any ratio, and read columns that no ratio does.
        return 1.0
    if settings.codec == Kvtc2Codec.name:
        groups = range(len(geometry.layer_groups))
        every = sum(geometry.row_size(other, "kv") for other in groups)
        return max(1.0, min(ratios) * geometry.row_size(group, name) / every)
    assert name != "kv"  # settings refuse pairs of codec 1
    if settings.common_budget:
        both = geometry.row_size(group, "kv")
        return max(1.0, min(ratios) * geometry.row_size(group, name) / both)
    return min(own_ratios(geometry, group, name, ratios, settings).values())


@dataclass(frozen=True)
class FitEstimate:
    """What the fit of a rank will take.

    peak_bytes: host and device memory together, the program itself left out.
    pca_seconds: of all sections, at the rates in `solvers`; reading and allocation come on top.
    Both are of whole bases; those in parts take less.
    solvers: those that will be used.
    """

    peak_bytes: int
    pca_seconds: float
    solvers: tuple[Solver, ...]


def estimate_fit(
    geometry: Geometry, train_rows: int, ratios: Sequence[float], settings: FitSettings
) -> FitEstimate:
    """Predict memory, solvers and their time. train_rows: how many there are."""
    rows = min(train_rows, settings.train_rows or train_rows)
    sample = min(rows, settings.simulation_rows)
    steps = settings.codec == Kvtc2Codec.name
    peak = held_before = 0
    seconds = 0.0
    methods: set[Solver] = set()
    ranks: list[int] = []
    for group, name in geometry.section_keys(settings.section_names):
        p = geometry.row_size(group, name)
        lowest = lowest_own_ratio(geometry, group, name, ratios, settings)
        solver, rank = choose_solver(rows, p, lowest, settings)
        held = rows * p * 4 if solver == "rsvd" else 0
        pca = held + READING_BYTES + peak_bytes(rows, p, solver, rank)
        # The basis in float16 and as an operand; the sample, its squares and coefficients.
        own = p * rank * (2 + 4) + sample * (p * (4 + 8 + 8) + rank * (4 + 4))
        tables = 0 if steps else table_bytes(rank, p, lowest, settings.sizes)
        peak = max(peak, held_before + pca, held_before + own + tables)
        if steps:
            # Basis and coefficients wait until all sections have theirs.
            held_before += 2 * p * rank + sample * rank * 4
        elif settings.common_budget and name == "k":
            # Basis, table and coefficients of K wait for those of V.
            held_before = 2 * p * rank + sample * rank * 4 + tables
        else:
            held_before = 0
        methods.add(solver)
        ranks.append(rank)
        seconds += predicted_seconds(rows, p, solver, rank, torch.device(settings.device).type)
    if steps:
        peak = max(peak, held_before + _TRIAL_BYTES * sample * max(ranks))
    return FitEstimate(peak, seconds, tuple(sorted(methods)))


def choose_solver(
    rows: int, row_size: int, ratio: float, settings: FitSettings
) -> tuple[Solver, int]:
    """Solver of a section and the columns to fit: no more than its lowest ratio can use.

    rows: of the fit. ratio: the section's lowest own target ratio.
    """
    rank = effective_rank(
        rows, row_size, min(settings.rank_cap, usable_rank(row_size, ratio, settings.sizes))
    )
    device = torch.device(settings.device)
    memory = device_memory(device)
    return resolve_method(settings.method, rows, row_size, rank, device.type, memory), rank


def usable_rank(row_size: int, ratio: float, sizes: Sequence[int]) -> int:
    """Most columns that a plan can read: all its bits in groups of the cheapest kind."""
    cheapest = min(
        group_cost_bits(quantizer.bits, size) / size
        for quantizer in REGISTRY.values()
        for size in sizes
    )
    return max(1, math.floor(budget_bits(row_size, ratio) / cheapest))
