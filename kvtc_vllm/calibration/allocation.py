"""Bit plans of one section, allocated on no more columns than they can use.

The dynamic program and the simulation before it take time and memory in proportion to the columns
that they are shown, and the last of them get no bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from kvtc_vllm.calibration.fit_settings import FitSettings
from kvtc_vllm.codec.artifact import SectionBasis
from kvtc_vllm.codec.bitplan import allocate, budget_bits
from kvtc_vllm.codec.payload import BitPlan
from kvtc_vllm.codec.transform import to_coefficients


def live_columns(variance: torch.Tensor, bits: int) -> int:
    """Columns that an ideal coder would give bits (reverse water-filling), at least 1.

    variance: float64 [r], falling. bits: per row. Real quantisers pay for scales and can't spend
    fractions of a bit, so they code fewer columns.
    """
    logs = variance.double().clamp_min(torch.finfo(torch.float64).tiny).log2()
    count = torch.arange(1, len(logs) + 1, dtype=torch.float64)
    # With the first k columns coded, each has half of log2(its variance / level) bits.
    level = (logs.cumsum(0) - 2 * bits) / count
    return max(1, int((logs > level).sum()))


def make_plans(
    section: SectionBasis,
    variance: torch.Tensor,
    sample: torch.Tensor,
    ratios: Mapping[float, float],
    settings: FitSettings,
    report: Callable[[str, int, int], None],
) -> dict[float, BitPlan]:
    """Allocate on the coefficients of some rows.

    section: mean and basis [p, r]; it has no plans yet. variance: float64 [r], falling.
    sample: float32 [n, p] in random order, where the simulation runs.
    ratios: target ratio, under which a plan is kept -> that of this section.
    """
    row_size, rank = section.basis.shape
    coefficients = to_coefficients(sample, section, rank)
    total = float((sample - section.mean).double().square().sum())
    margin = max(settings.sizes)
    shown = live_columns(variance, budget_bits(row_size, min(ratios.values()))) + margin
    while True:
        shown = min(shown, rank)
        leading = coefficients[:, :shown]
        inside = float(leading.double().square().sum())
        found = allocate(
            leading,
            row_size,
            tuple(ratios.values()),
            residual_energy=max(0.0, total - inside),
            sizes=settings.sizes,
            window_samples=settings.window_samples,
            device=settings.device,
            progress=report,
        )
        # A plan that ends a whole group before the last column shown had no use for it.
        if shown == rank or max(plan.rank for plan in found.values()) + margin <= shown:
            return {ratio: replace(found[own], ratio=ratio) for ratio, own in ratios.items()}
        shown *= 2
