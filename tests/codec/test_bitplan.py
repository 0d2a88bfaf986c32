"""The allocation against brute force, and against what quantising really does."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvtc_vllm.codec.bitplan import (
    allocate,
    apply_plan,
    budget_bits,
    plan_bits,
    table_bytes,
)
from kvtc_vllm.codec.payload import BitPlan, CoefficientGroup
from kvtc_vllm.codec.quantizers import REGISTRY, group_cost_bits


def decaying(rows: int, rank: int, seed: int = 0, decades: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator) * torch.logspace(1, 1 - decades, rank)


def segmentations(rank: int, sizes: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """Every way to cut 0..rank into (start, size) pieces of the given sizes."""

    def cut(start: int) -> list[list[tuple[int, int]]]:
        if start == rank:
            return [[]]
        return [
            [(start, size), *rest]
            for size in sizes
            if start + size <= rank
            for rest in cut(start + size)
        ]

    return cut(0)


def outcomes(coefficients: torch.Tensor, sizes: tuple[int, ...]) -> list[tuple[int, float]]:
    """(bits, squared error) of every segmentation and type assignment.

    Single coefficients can always be dropped; they can be stored if 1 is a size.
    """
    error: dict[tuple[int, int, str], float] = {}
    rank = coefficients.shape[1]
    for size in {1, *sizes}:
        for start in range(rank - size + 1):
            block = coefficients[:, start : start + size].contiguous()
            error[start, size, "none"] = float(block.double().square().sum())
            for name, quantizer in REGISTRY.items():
                restored = quantizer.dequantize(*quantizer.quantize(block))
                error[start, size, name] = float((restored - block).double().square().sum())
    found = []
    for pieces in segmentations(rank, tuple({1, *sizes})):
        allowed = [("none", *REGISTRY) if size in sizes else ("none",) for _, size in pieces]
        for types in itertools.product(*allowed):
            chosen = [(start, size, t) for (start, size), t in zip(pieces, types, strict=True)]
            bits = sum(
                group_cost_bits(REGISTRY[t].bits, size) for _, size, t in chosen if t != "none"
            )
            found.append((bits, sum(error[group] for group in chosen)))
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("rank", "sizes"), [(1, (1, 2, 3)), (4, (1, 2, 3)), (5, (1, 2, 3)), (6, (2, 3)), (2, (3,))]
)
def test_equals_brute_force(seed: int, rank: int, sizes: tuple[int, ...]) -> None:
    coefficients = decaying(12, rank, seed)
    total = float(coefficients.double().square().sum())
    possible = outcomes(coefficients, sizes)
    ratios = (1.0, 1.5, 2.0, 4.0, 6.0)
    plans = allocate(coefficients, 10, ratios, sizes=sizes, window_samples=None)
    for ratio in ratios:
        expected = min(error for bits, error in possible if bits <= budget_bits(10, ratio))
        assert plans[ratio].predicted_error * total == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_budgets_kept_and_error_monotone() -> None:
    coefficients = decaying(256, 200)
    ratios = (2.0, 4.0, 5.3, 8.0, 16.0, 32.0, 64.0)
    plans = allocate(coefficients, 256, ratios, window_samples=None)
    errors = [plans[r].predicted_error for r in ratios]
    assert errors == sorted(errors)
    for ratio, plan in plans.items():
        assert plan.ratio == ratio
        assert 0 < plan_bits(plan) <= budget_bits(256, ratio)
        starts = [g.start for g in plan.groups]
        assert starts == sorted(starts)
        for left, right in itertools.pairwise(plan.groups):
            assert left.start + left.size <= right.start
        assert plan.rank <= 200


def test_predicted_error_is_what_quantising_gives() -> None:
    coefficients = decaying(512, 96)
    residual = 123.0
    plan = allocate(coefficients, 128, (8.0,), residual_energy=residual)[8.0]
    total = float(coefficients.double().square().sum()) + residual
    restored = apply_plan(coefficients, plan)
    measured = float((coefficients - restored).double().square().sum()) + residual
    assert plan.predicted_error == pytest.approx(measured / total, rel=1e-9)
    unseen = decaying(512, 96, seed=1)
    unseen_error = float((unseen - apply_plan(unseen, plan)).double().square().sum())
    unseen_total = float(unseen.double().square().sum())
    expected = (measured - residual) / (total - residual)
    assert unseen_error / unseen_total == pytest.approx(expected, rel=0.1)


def test_one_run_serves_every_ratio() -> None:
    coefficients = decaying(200, 120)
    together = allocate(coefficients, 128, (4.0, 16.0))
    assert together[16.0] == allocate(coefficients, 128, (16.0,))[16.0]


def test_sampling_windows_costs_little() -> None:
    coefficients = decaying(1024, 128, decades=3.0)
    exact = allocate(coefficients, 128, (4.0, 16.0), window_samples=None)
    sampled = allocate(coefficients, 128, (4.0, 16.0), window_samples=1 << 12)
    for ratio, plan in exact.items():
        assert sampled[ratio].predicted_error <= 1.02 * plan.predicted_error


def test_budget_below_one_group_stores_nothing() -> None:
    coefficients = decaying(16, 4)
    plan = allocate(coefficients, 8, (8.0,))[8.0]
    assert plan.groups == ()
    assert plan.predicted_error == pytest.approx(1.0)
    assert plan.rank == 0


def test_constant_zero_coefficients_are_dropped() -> None:
    plan = allocate(torch.zeros(8, 6), 16, (2.0,))[2.0]
    assert plan.groups == ()
    assert plan.predicted_error == 0.0


def test_apply_plan_leaves_gaps_zero() -> None:
    coefficients = decaying(10, 8)
    groups = (CoefficientGroup(0, 2, "fp8"), CoefficientGroup(4, 2, "int4"))
    restored = apply_plan(coefficients, BitPlan(4.0, groups, 0.0))
    assert torch.all(restored[:, 2:4] == 0)
    assert torch.all(restored[:, 6:] == 0)
    assert torch.allclose(restored[:, :2], coefficients[:, :2], rtol=0.1, atol=0.1)


def test_progress_reaches_the_end() -> None:
    seen: dict[str, tuple[int, int]] = {}
    allocate(
        decaying(64, 20), 32, (4.0,), progress=lambda stage, d, t: seen.update({stage: (d, t)})
    )
    assert set(seen) == {"simulate", "allocate"}
    assert all(done == total for done, total in seen.values())


def test_table_bytes_of_the_largest_promised_case() -> None:
    assert table_bytes(10_000, 32_768, 8.0) < 700 * 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": ()}, "ratios"),
        ({"ratios": (0.5,)}, "ratios"),
        ({"ratios": (4.0, 4.0)}, "twice"),
        ({"sizes": (0,)}, "sizes"),
        ({"row_size": 3}, "columns"),
        ({"residual_energy": -1.0}, "residual_energy"),
        ({"coefficients": torch.zeros(3)}, "shape"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"coefficients": decaying(4, 4), "row_size": 8, "ratios": (4.0,)} | change
    with pytest.raises(ValueError, match=message):
        allocate(**arguments)
