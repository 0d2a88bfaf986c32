"""The compiled payload of a step plan against the plan's own, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvtc_vllm.codec.artifact import SectionBasis
from kvtc_vllm.codec.cpu.step_section import StepSection
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.v2.codes import decode_codes, encode_codes
from kvtc_vllm.codec.v2.plan import StepPlan
from tests.codec.v2.made_up import step_plan_of

CPU = torch.device("cpu")
RANK = 83


@pytest.fixture(scope="module")
def plan() -> StepPlan:
    """Of every width, and of columns that are no multiple of a block."""
    drawn = torch.randn(512, RANK, generator=torch.Generator().manual_seed(0))
    made = step_plan_of(drawn * torch.logspace(2, -0.5, RANK), RANK, 4.0)
    assert {part.width for part in made.packed} == {2, 4, 8}
    return made


def section_of(plan: StepPlan) -> StepSection:
    basis = torch.eye(plan.rank + 1, plan.rank, dtype=torch.float16)
    return StepSection(SectionBasis(torch.zeros(plan.rank + 1), basis, {4.0: plan}), plan, False)


def coefficients(plan: StepPlan, tokens: int, seed: int) -> torch.Tensor:
    """Of all sizes: some on rounding boundaries, some escapes, some wide."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(tokens, plan.rank, generator=generator) * 3 * plan.step
    drawn[::5] *= 40
    drawn[1::7, ::3] *= 5000
    edges = plan.step * torch.arange(plan.rank) / 4
    drawn[-1] = edges * (1 - 2 * (torch.arange(plan.rank) % 2))
    largest = 30_000 * plan.step
    return drawn.clamp(-largest, largest)


def held(plan: StepPlan, x: torch.Tensor) -> torch.Tensor:
    """Columns in the order in which a section holds them: by falling width."""
    return torch.cat([x[:, part.columns] for part in reversed(plan.packed)], dim=1)


@pytest.mark.parametrize("tokens", [1, 3, 16, 100, 128])
def test_the_bytes_are_the_reference_s(plan: StepPlan, tokens: int) -> None:
    x = coefficients(plan, tokens, tokens)
    section = section_of(plan)
    ones = np.ones(tokens, np.float32)
    streams = section.payload(held(plan, x), ones)
    assert streams == encode_codes(plan.quantise(x), plan.packed)
    payload = bytearray(b"".join(streams))
    out = np.zeros((tokens, section.live), np.float32)
    section.coefficients(payload, out)
    codes = decode_codes(payload, plan.packed, plan.rank, tokens, CPU)
    assert torch.equal(torch.from_numpy(out), held(plan, plan.restore(codes)))


@pytest.mark.parametrize("tokens", [1, 3, 13])
def test_padding_may_be_anything(plan: StepPlan, tokens: int) -> None:
    """Ones in it are no escapes."""
    section = section_of(plan)
    streams = section.payload(coefficients(plan, tokens, 5), np.ones(tokens, np.float32))
    padded = bytearray(b"".join(streams))
    at = 0
    for part in plan.packed:
        size = part.packed_bytes(tokens) // len(part.columns)
        for last in range(at + size - 1, at + part.packed_bytes(tokens), size):
            padded[last] |= 0xFF << ((tokens * part.width - 1) % 8 + 1) & 0xFF
        at += part.packed_bytes(tokens)
    assert padded != b"".join(streams)
    out = [np.zeros((tokens, section.live), np.float32) for _ in range(2)]
    section.coefficients(bytearray(b"".join(streams)), out[0])
    section.coefficients(padded, out[1])
    assert np.array_equal(*out)


def test_factors_are_multiplied_in(plan: StepPlan) -> None:
    x = coefficients(plan, 16, 3)
    factors = torch.linspace(0.25, 1.0, 16)
    streams = section_of(plan).payload(held(plan, x), factors.numpy())
    assert streams == encode_codes(plan.quantise(x * factors[:, None]), plan.packed)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e30])
def test_what_has_no_code_is_refused(plan: StepPlan, wrong: float) -> None:
    x = torch.zeros(3, plan.rank)
    x[1, 2] = wrong
    with pytest.raises(CodecError) as caught:
        section_of(plan).payload(x, np.ones(3, np.float32))
    assert caught.value.reason == "range"


def test_uneven_escapes_are_refused(plan: StepPlan) -> None:
    section = section_of(plan)
    streams = section.payload(coefficients(plan, 16, 1), np.ones(16, np.float32))
    payload = b"".join(streams)
    for wrong in (payload[:-1], payload + b"\0", payload[: plan.raw_length(16)]):
        with pytest.raises(ContainerError) as caught:
            section.coefficients(bytearray(wrong), np.zeros((16, section.live), np.float32))
        assert caught.value.reason == "bounds"


def test_a_plan_that_stores_nothing(plan: StepPlan) -> None:
    empty = replace(plan, classes=torch.zeros(0, dtype=torch.uint8))
    section = section_of(empty)
    assert section.payload(torch.zeros(5, 0), np.ones(5, np.float32)) == []
    section.coefficients(bytearray(), np.zeros((5, 0), np.float32))


def test_memory_counts_what_marked_tokens_have_beyond(plan: StepPlan) -> None:
    size = 2 * plan.rank
    both = replace(plan, beyond=plan)
    basis = SectionBasis(torch.zeros(size), torch.eye(size).half(), {4.0: both})
    alone = StepSection(basis, plan, False)
    beyond = StepSection(basis, plan, False, offset=plan.rank)
    assert StepSection(basis, both, False).nbytes == alone.nbytes + beyond.nbytes
