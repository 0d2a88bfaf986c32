"""Bit allocation of one section, on no more columns than plans can use, and of K and V together.

The dynamic program and the simulation before it take time and memory in proportion to the columns
that they are shown, and the last of them get no bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from kvtc_vllm.calibration.fit_settings import FitSettings
from kvtc_vllm.codec.artifact import Kind, SectionBasis
from kvtc_vllm.codec.bitplan import AllocationTable, tabulate
from kvtc_vllm.codec.quantizers import REGISTRY, group_cost_bits
from kvtc_vllm.codec.transform import centred_rows, to_coefficients

MARGIN = 1.05
"""Columns shown, over those that `live_columns` expects to be coded."""

_NORMAL_ROWS = 256


def live_columns(variance: torch.Tensor, bits: int, sizes: Sequence[int]) -> int:
    """Columns that plans of `bits` bits per row are expected to code, at least 1.

    variance: float64 [r], falling. sizes: of coefficient groups. Every column is given the size
    and type that remove most error at one price per bit, as if coefficients were normal and those
    of a group alike. On keys of SmolLM2-135M it is within 1 % of the plans for 8x, 16x
    and 32x, and 11 % above that for 64x.
    """
    generator = torch.Generator().manual_seed(0)
    costs, removed = [], []
    for size in sizes:
        normal = torch.randn(_NORMAL_ROWS, size, generator=generator)
        for quantizer in REGISTRY.values():
            error = quantizer.dequantize(*quantizer.quantize(normal)) - normal
            removed.append(1 - float(error.square().sum() / normal.square().sum()))
            costs.append(group_cost_bits(quantizer.bits, size) / size)
    cost = torch.tensor(costs, dtype=torch.float64)
    gain = variance.double()[:, None] * torch.tensor(removed, dtype=torch.float64)

    def bits_taken(columns: int) -> float:
        """If the last of these columns is just worth its bits."""
        price = float((gain[columns - 1] / cost).max())
        best, kind = (gain - price * cost).max(dim=1)
        return float(cost[kind][best >= 0].sum())

    low, high = 1, len(variance)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bits_taken(middle) <= bits else (low, middle - 1)
    return low


def make_table(
    section: SectionBasis,
    variance: torch.Tensor,
    sample: torch.Tensor,
    budgets: Sequence[int],
    settings: FitSettings,
    report: Callable[[str, int, int], None],
) -> AllocationTable:
    """The best plan for every budget, from the coefficients of some rows.

    section: mean, basis [p, r] and weights; it has no plans yet. variance: float64 [r], falling.
    sample: float32 [n, p] in random order, where the simulation runs.
    budgets: bits per row, up to the most of which plans will be asked for.
    """
    row_size, rank = section.basis.shape
    coefficients = to_coefficients(sample, section, rank)
    total = float(centred_rows(sample, section).double().square().sum())
    margin = max(settings.sizes)
    most = max(budgets)
    shown = math.ceil(MARGIN * live_columns(variance, most, settings.sizes)) + margin
    while True:
        shown = min(shown, rank)
        leading = coefficients[:, :shown]
        inside = float(leading.double().square().sum())
        table = tabulate(
            leading,
            row_size,
            most,
            residual_energy=max(0.0, total - inside),
            sizes=settings.sizes,
            window_samples=settings.window_samples,
            device=settings.device,
            progress=report,
        )
        read = max(
            (g.start + g.size for bits in budgets for g in table.groups(bits)),
            default=0,
        )
        # A plan that ends a whole group before the last column shown had no use for it.
        if shown == rank or read + margin <= shown:
            return table
        shown *= 2


def divide_budget(tables: Mapping[Kind, AllocationTable], bits: int) -> dict[Kind, int]:
    """Bits of K and of V, at most `bits` together, that leave least squared error of both.

    tables: of equally many rows, in units in which an error of K costs what one of V does.
    """
    keys, values = tables["k"], tables["v"]
    of_keys = np.arange(len(keys.errors)) * keys.unit
    of_keys = of_keys[of_keys <= bits]
    of_values = np.minimum((bits - of_keys) // values.unit, len(values.errors) - 1)
    best = int((keys.errors[: len(of_keys)] + values.errors[of_values]).argmin())
    return {"k": int(of_keys[best]), "v": int(of_values[best]) * values.unit}
