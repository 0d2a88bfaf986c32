"""What a report says about the plans of a section, codec by codec."""

from __future__ import annotations

import torch

from kvtc_vllm.codec.bitplan import plan_bits
from kvtc_vllm.codec.payload import BitPlan
from kvtc_vllm.codec.quantizers import REGISTRY, group_cost_bits
from kvtc_vllm.codec.section_coder import SectionCoder
from kvtc_vllm.codec.v2.plan import StepPlan


def describe_plan(plan: SectionCoder) -> str:
    """In a few words."""
    if isinstance(plan, BitPlan):
        return f"{plan_bits(plan)} bits in {len(plan.groups)} groups"
    assert isinstance(plan, StepPlan)
    return (
        f"{plan.token_bytes:.1f} bytes per token, {plan.rank} coefficients in "
        f"{len(plan.widths)} classes, step {plan.step:.4g}"
    )


def bits_per_coefficient(plan: SectionCoder, rank: int) -> torch.Tensor:
    """Bits that each coefficient takes before entropy coding: float64 [rank].

    Of a bit plan its share of shift and scale is in them, of a step plan no escape is.
    """
    bits = torch.zeros(rank, dtype=torch.float64)
    if isinstance(plan, BitPlan):
        for g in plan.groups:
            each = group_cost_bits(REGISTRY[g.type].bits, g.size) / g.size
            bits[g.start : g.start + g.size] = each
        return bits
    assert isinstance(plan, StepPlan)
    bits[: plan.rank] = plan.widths[plan.classes.long()].double()
    return bits
