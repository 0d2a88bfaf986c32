"""Bit allocation: the exact dynamic program of KVTC (arXiv 2511.01815, section 3.2, app. B.17).

Coefficients are cut into contiguous groups; every group has a size and a type,
or is dropped. A stored group costs its payload plus one float16 shift and scale
per token. The program finds the cut with the least squared error for every
budget at once, where the error of each possible group is *simulated* with the
codec's own quantisers:

    best[i, b] = min(best[i-1, b],
                     min over size s, type t of best[i-s, b-cost(s,t)] - gain(i-s, s, t))

with gain = energy of the group minus its quantisation error, and every entry
starting at the energy of all coefficients. Dropping a group of any size equals
dropping its coefficients one by one, so "none" is the single candidate of size 1.

One pass at the largest budget serves every ratio: each plan is traced back
from its own budget column.

Cost. The table takes rank x 15 vector operations of length budget / 2 (every
cost is even) and one byte of back-pointer per cell. Measured on one shared CPU
core at p = 32768 with rank 2000 and scaled to rank 10000: 12 s for 8x and up,
22 s for 4x and up, 0.6 and 1.1 GiB (`table_bytes`). Simulation at that size is
about 1.7e9 elements, each through every quantiser, at 2e7 per second and core:
about 90 s of CPU. At p = rank = 1024 both together take 3 to 10 s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.artifact import SectionBasis, SectionKey
from kvtc_vllm.codec.dynamic_program import (
    Candidate,
    Choices,
    FloatArray,
    Progress,
    fill_table,
    trace_back,
)
from kvtc_vllm.codec.entropy import UNIT_ALIGNMENT, UNIT_BYTES, UNIT_TARGET
from kvtc_vllm.codec.payload import SCALE_STREAMS, BitPlan, CoefficientGroup, bit_plan
from kvtc_vllm.codec.quantizers import REGISTRY, Quantizer, group_cost_bits

GROUP_SIZES: tuple[int, ...] = (1, 16, 64, 256, 1024)
CACHE_BITS = 16
"""Bits of one uncompressed cache element that target ratios are relative to."""

WINDOW_SAMPLES = 1 << 15
"""Default number of elements from which the error of one possible group is estimated.

On keys of the reference model (p = 1024, 2048 rows) the plans for 4x to 64x had the
same error to three digits as with all rows, predicted and held out, in a quarter of
the time.
"""

# Small enough for the cache of one core and for torch not to split an operation
# over threads, whose barrier is ruinous on a machine shared with others.
_CPU_BLOCK_ELEMENTS = 1 << 15
_DEVICE_BLOCK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class AllocationTable:
    """The best plan of a section for every budget.

    errors: float64 [n], never rising: squared error of all rows of `sample` that the program
    expects of the plan of i * unit bits per row, what lies outside the basis included.
    sample: float32 [rows, r], coefficients. residual_energy: of the same rows outside the basis.
    total: energy of the rows.
    """

    errors: FloatArray
    unit: int
    sample: torch.Tensor
    residual_energy: float
    total: float
    _candidates: Sequence[Candidate]
    _choices: Choices

    def plan(self, ratio: float, bits: int) -> BitPlan:
        """Of at most `bits` bits per row, to be known under `ratio`. Its error is measured."""
        plan = BitPlan(ratio=ratio, groups=self.groups(bits), predicted_error=0.0)
        error = float((self.sample - apply_plan(self.sample, plan)).double().square().sum())
        relative = (error + self.residual_energy) / self.total if self.total > 0 else 0.0
        return replace(plan, predicted_error=relative)

    def groups(self, bits: int) -> tuple[CoefficientGroup, ...]:
        """Those of `plan`."""
        return trace_back(self._choices, self._candidates, bits // self.unit)


def budget_bits(row_size: int, ratio: float) -> int:
    """Bits that a row of `row_size` elements may take at a target ratio: floor(16 p / ratio)."""
    return math.floor(CACHE_BITS * row_size / ratio)


def budget_bytes(row_size: int, ratio: float, tokens: int) -> int:
    """Most bytes that K and V of a layer group take in a blob at a target ratio.

    row_size: elements of a row of K and one of V together. An upper bound of
    `SectionCoder.max_bytes` of both for any plans that are not `over_budget`: every stored group
    may pad its codes to a whole byte, every unit takes an entry in the table and padding.
    """
    bits = budget_bits(row_size, ratio)
    least_group = min(group_cost_bits(q.bits, 1) for q in REGISTRY.values())
    payload = bits * tokens // 8 + 1 + bits // least_group
    streams = 2 * (SCALE_STREAMS + len(REGISTRY))
    units = streams + payload // UNIT_TARGET
    return payload + units * (UNIT_BYTES + UNIT_ALIGNMENT)


def plan_bits(plan: BitPlan) -> int:
    """Bits that one coded row takes before entropy coding, shifts and scales included."""
    return sum(group_cost_bits(REGISTRY[g.type].bits, g.size) for g in plan.groups)


def over_budget(sections: Mapping[SectionKey, SectionBasis]) -> str | None:
    """The first plans that take more bits than their ratio allows, in words; None if none do.

    K and V of a layer group share one budget, of which either may have more than half.
    """
    for group in sorted({group for group, _ in sections}):
        pair = [(name, section) for (of, name), section in sections.items() if of == group]
        for ratio in sorted({ratio for _, section in pair for ratio in section.plans}):
            there = [(tensor, section) for tensor, section in pair if ratio in section.plans]
            taken = {name: plan_bits(bit_plan(section, ratio)) for name, section in there}
            allowed = budget_bits(sum(len(section.mean) for _, section in there), ratio)
            if sum(taken.values()) > allowed:
                each = " and ".join(f"{name.upper()} {bits}" for name, bits in taken.items())
                return (
                    f"the plans of layer group {group} at ratio {ratio:g} take {each} bits a "
                    f"row, the budget is {allowed}"
                )
    return None


def apply_plan(coefficients: torch.Tensor, plan: BitPlan) -> torch.Tensor:
    """Quantise and dequantise coefficients as the codec does.

    coefficients: float32 [n, r], r >= plan.rank. Returns float32 [n, r], zero
    outside the plan's groups.
    """
    restored = torch.zeros_like(coefficients)
    for group in plan.groups:
        window = slice(group.start, group.start + group.size)
        quantizer = REGISTRY[group.type]
        block = coefficients[:, window].contiguous()
        restored[:, window] = quantizer.dequantize(*quantizer.quantize(block))
    return restored


def allocate(
    coefficients: torch.Tensor,
    row_size: int,
    ratios: Sequence[float],
    *,
    residual_energy: float = 0.0,
    sizes: Sequence[int] = GROUP_SIZES,
    quantizers: Mapping[str, Quantizer] = REGISTRY,
    window_samples: int | None = WINDOW_SAMPLES,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[float, BitPlan]:
    """Find the plan of least error for every target ratio.

    coefficients: float32 [n, r], rows in random order, columns by falling
    variance. row_size: p, the number of cache elements of a row.
    residual_energy: sum of squares of the same n centred rows outside the r
    basis columns, so that `predicted_error` is relative to the full variance.
    window_samples: the error of a group of size s is estimated from the first
    max(64, window_samples / s) rows (scaled by the energy of all rows), which
    gives every size the same number of elements; None uses all rows for
    every size, as the paper does. device: where the simulation runs.

    `predicted_error` of the returned plans is measured by quantising all n
    rows with the finished plan. Raises ValueError for arguments out of range.
    """
    if not ratios or any(not math.isfinite(r) or r < 1 for r in ratios):
        raise ValueError(f"ratios {tuple(ratios)} must be one or more finite numbers, each >= 1")
    if len(set(ratios)) != len(ratios):
        raise ValueError(f"ratios {tuple(ratios)} name a ratio twice; each may appear once")
    budgets = {ratio: budget_bits(row_size, ratio) for ratio in ratios}
    table = tabulate(
        coefficients,
        row_size,
        max(budgets.values()),
        residual_energy=residual_energy,
        sizes=sizes,
        quantizers=quantizers,
        window_samples=window_samples,
        device=device,
        progress=progress,
    )
    return {ratio: table.plan(ratio, bits) for ratio, bits in budgets.items()}


def tabulate(
    coefficients: torch.Tensor,
    row_size: int,
    bits: int,
    *,
    residual_energy: float = 0.0,
    sizes: Sequence[int] = GROUP_SIZES,
    quantizers: Mapping[str, Quantizer] = REGISTRY,
    window_samples: int | None = WINDOW_SAMPLES,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> AllocationTable:
    """`allocate` for every budget up to `bits` per row. Raises ValueError as it does."""
    _check(coefficients, row_size, sizes, residual_energy)
    sample = coefficients.detach().to("cpu", torch.float32).contiguous()
    energy = sample.double().square().sum(dim=0).numpy()
    total = float(energy.sum()) + residual_energy
    gains = _simulate_gains(
        sample, energy, sizes, quantizers, window_samples, torch.device(device), progress
    )

    costs = {(size, name): group_cost_bits(quantizers[name].bits, size) for size, name in gains}
    unit = math.gcd(*costs.values()) or 1
    candidates = [
        Candidate(size, name, costs[size, name] // unit, gain)
        for (size, name), gain in gains.items()
    ]
    # Equal errors go to the earlier candidate: `_worthwhile` needs cheap types first.
    candidates.sort(key=lambda c: (c.size, c.cost))
    choices, errors = fill_table(candidates, len(energy), bits // unit + 1, total, progress)
    return AllocationTable(errors, unit, sample, residual_energy, total, candidates, choices)


def table_bytes(rank: int, row_size: int, ratio: float, sizes: Sequence[int] = GROUP_SIZES) -> int:
    """Host memory of the allocation table at the smallest ratio, in bytes."""
    columns = budget_bits(row_size, ratio) // 2 + 1
    return columns * (rank + 1 + 8 * (min(max(sizes), rank) + 3))


def _check(
    coefficients: torch.Tensor,
    row_size: int,
    sizes: Sequence[int],
    residual_energy: float,
) -> None:
    if coefficients.dim() != 2 or 0 in coefficients.shape:
        raise ValueError(
            f"coefficients have shape {tuple(coefficients.shape)}; they must be [rows, rank], "
            "neither zero"
        )
    if coefficients.shape[1] > row_size:
        raise ValueError(
            f"coefficients have {coefficients.shape[1]} columns; "
            f"a row of {row_size} elements has at most {row_size}"
        )
    if not sizes or any(s < 1 for s in sizes) or len(set(sizes)) != len(sizes):
        raise ValueError(f"sizes {tuple(sizes)} must be distinct positive group sizes")
    if not (math.isfinite(residual_energy) and residual_energy >= 0):
        raise ValueError(f"residual_energy {residual_energy} must be finite and not negative")


def _simulate_gains(
    sample: torch.Tensor,
    energy: FloatArray,
    sizes: Sequence[int],
    quantizers: Mapping[str, Quantizer],
    window_samples: int | None,
    device: torch.device,
    progress: Progress | None,
) -> dict[tuple[int, str], FloatArray]:
    """Gain of every (size, type) at every start: float64 [r - size + 1] each."""
    rows, rank = sample.shape
    usable = [size for size in sizes if size <= rank]
    used_rows = {
        size: rows if window_samples is None else min(rows, max(64, window_samples // size))
        for size in usable
    }
    on_cpu = device.type == "cpu"
    block = _CPU_BLOCK_ELEMENTS if on_cpu else _DEVICE_BLOCK_ELEMENTS
    held = sample.to(device)
    cumulative = np.concatenate(([0.0], np.cumsum(energy)))
    work = {size: used_rows[size] * (rank - size + 1) * size for size in usable}
    finished = 0
    gains: dict[tuple[int, str], FloatArray] = {}

    def simulate(
        task: tuple[int, slice, slice],
    ) -> tuple[slice, list[npt.NDArray[np.float64]]]:
        size, row_range, starts = task
        windows = held[row_range].unfold(1, size, 1)[:, starts].contiguous()
        errors = []
        for quantizer in quantizers.values():
            restored = quantizer.dequantize(*quantizer.quantize(windows))
            difference = restored.sub_(windows).square_().sum(dim=(0, 2))
            errors.append(difference.double().cpu().numpy())
        return starts, errors

    with ThreadPoolExecutor(torch.get_num_threads() if on_cpu else 1) as pool:
        for size in usable:
            count = rank - size + 1
            errors = np.zeros((len(quantizers), count))
            tasks = list(_blocks(size, used_rows[size], count, block))
            for done, (starts, part) in enumerate(pool.map(simulate, tasks), start=1):
                errors[:, starts] += np.stack(part)
                if progress is not None and (done % 64 == 0 or done == len(tasks)):
                    share = work[size] * done // len(tasks)
                    progress("simulate", finished + share, sum(work.values()))
            finished += work[size]
            window_energy = cumulative[size:] - cumulative[:-size]
            errors *= _energy_share(sample, used_rows[size], size, window_energy)
            for name, error in zip(quantizers, errors, strict=True):
                gains[size, name] = window_energy - error
    return gains


def _blocks(size: int, rows: int, count: int, elements: int) -> Iterator[tuple[int, slice, slice]]:
    """Cut rows x windows into blocks of at most about `elements` elements."""
    row_step = max(1, min(rows, elements // size))
    window_step = max(1, elements // (size * row_step))
    for first_window in range(0, count, window_step):
        for first_row in range(0, rows, row_step):
            yield (
                size,
                slice(first_row, min(rows, first_row + row_step)),
                slice(first_window, min(count, first_window + window_step)),
            )


def _energy_share(
    sample: torch.Tensor, rows: int, size: int, window_energy: FloatArray
) -> FloatArray | float:
    """Factor from the error of the first `rows` rows to that of all rows, a window."""
    if rows == len(sample):
        return 1.0
    used = sample[:rows].double().square().sum(dim=0).numpy()
    cumulative = np.concatenate(([0.0], np.cumsum(used)))
    seen = cumulative[size:] - cumulative[:-size]
    factor = np.full_like(window_energy, len(sample) / rows)
    np.divide(window_energy, seen, out=factor, where=seen > 0)
    return factor
