"""Compiled quantisers, packing and layout against the reference: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtc_vllm.codec.artifact import SectionBasis
from kvtc_vllm.codec.cpu.bit_section import BitSection
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.payload import (
    BitPlan,
    CoefficientGroup,
    decode_payload,
    encode_payload,
    payload_length,
)
from kvtc_vllm.codec.quantizers import BY_TYPE_ID, REGISTRY
from kvtc_vllm.codec.quantizers.base import FP16_MAX

# What quantisers find hard, beside numbers of every size: ties, ends of float16, almost nothing.
HARD = (0.0, -0.0, 0.5, -1.5, 2.0**-24, -(2.0**-25), 6e-8, 65504.0, -65504.0, 448.0, 1e-30)


@st.composite
def plans(draw: st.DrawFn) -> BitPlan:
    """Groups of any size and type with gaps between them."""
    groups = []
    start = 0
    for _ in range(draw(st.integers(0, 8))):
        start += draw(st.sampled_from((0, 0, 1, 5)))
        size = draw(st.sampled_from((1, 1, 2, 3, 4, 5, 16, 17, 64, 100)))
        groups.append(CoefficientGroup(start, size, draw(st.sampled_from(sorted(REGISTRY)))))
        start += size
    return BitPlan(ratio=8.0, groups=tuple(groups), predicted_error=0.0)


def section_of(plan: BitPlan) -> BitSection:
    """Of a plan, with a basis that is not looked at."""
    basis = torch.zeros(plan.rank + 1, plan.rank, dtype=torch.float16)
    return BitSection(SectionBasis(torch.zeros(plan.rank + 1), basis, {8.0: plan}), 8.0, False)


@st.composite
def cases(draw: st.DrawFn) -> tuple[BitPlan, torch.Tensor]:
    """A plan and coefficients for it."""
    plan, tokens = draw(plans()), draw(st.integers(1, 9))
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (tokens, plan.rank)
    x = chance.standard_normal(shape) * 2.0 ** chance.integers(-30, 10, (tokens, 1))
    hard = chance.choice(np.array(HARD), shape)
    x = np.where(chance.random(shape) < draw(st.sampled_from((0.0, 0.3, 1.0))), hard, x)
    return plan, torch.from_numpy(x.astype(np.float32).clip(-FP16_MAX, FP16_MAX))


def without_sign_of_zero(payload: bytes, plan: BitPlan, tokens: int) -> bytes:
    """The payload with +0 for every shift of -0, which is left to the writer."""
    data, plane = bytearray(payload), len(plan.groups) * tokens
    for i in range(plane):
        if data[i] == 0x80 and data[2 * plane + i] == 0:
            data[i] = 0
    return bytes(data)


@given(cases())
@settings(max_examples=400)
def test_payloads_are_the_reference_s(case):
    plan, x = case
    section, tokens = section_of(plan), len(x)
    streams = section.payload(x.clone(), np.ones(tokens, np.float32))
    expected = encode_payload(x, plan)
    assert [len(s) for s in streams] == [len(s) for s in expected]
    found, wanted = (without_sign_of_zero(b"".join(s), plan, tokens) for s in (streams, expected))
    assert found == wanted


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or its message if it refuses."""
    try:
        return call()
    except ContainerError as error:
        return str(error)


@given(plans(), st.integers(1, 9), st.integers(0, 2**32))
@settings(max_examples=400)
def test_any_bytes_decode_as_the_reference_decodes_them(plan, tokens, seed):
    chance = np.random.default_rng(seed)
    payload = bytearray(chance.bytes(payload_length(plan, tokens)))
    plane = len(plan.groups) * tokens
    if seed % 2:
        # Mostly finite: shifts and scales below infinity, codes that are no NaN.
        for i in range(len(payload)):
            payload[i] &= 0x3B if i < 2 * plane else 0x77 if i >= 4 * plane else 0xFF
    columns = [c for g in plan.groups for c in range(g.start, g.start + g.size)]
    found = np.zeros((tokens, len(columns)), np.float32)
    section = section_of(plan)
    expected = outcome(lambda: decode_payload(payload, plan, tokens)[:, columns])
    error = outcome(lambda: section.coefficients(payload, found))
    if isinstance(expected, str):
        assert error == expected
    else:
        assert error is None
        assert torch.equal(torch.from_numpy(found), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -65505.0])
def test_what_cannot_be_stored_is_refused(value):
    plan = BitPlan(8.0, (CoefficientGroup(2, 4, "int4"),), 0.0)
    # Column 0 is in no group; the reference looks at it too.
    for column in (0, 3):
        x = torch.ones(3, plan.rank)
        x[1, column] = value
        with pytest.raises(CodecError) as caught:
            section_of(plan).payload(x, np.ones(3, np.float32))
        assert caught.value.reason == "range"


def test_every_float16_and_every_fp8_code():
    """Shifts of groups of one element are their float16; every code of fp8 is read."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    finite = halves[halves.isfinite()].float()
    between = torch.nextafter(finite, torch.tensor(torch.inf)).clamp(-FP16_MAX, FP16_MAX)
    for x in (finite, between, (finite[1:] + finite[:-1]) / 2):
        plan = BitPlan(8.0, (CoefficientGroup(0, 1, "int2"),), 0.0)
        column = x.clamp(-FP16_MAX, FP16_MAX)[:, None].contiguous()
        streams = section_of(plan).payload(column.clone(), np.ones(len(column), np.float32))
        assert streams == encode_payload(column, plan)
    plan = BitPlan(8.0, (CoefficientGroup(0, 256, "fp8"),), 0.0)
    x = (
        BY_TYPE_ID[3]
        .dequantize(torch.arange(256, dtype=torch.uint8)[None], torch.zeros(1), torch.ones(1))
        .nan_to_num(0.0)
    )
    streams = section_of(plan).payload(x.clone(), np.ones(1, np.float32))
    assert streams == encode_payload(x, plan)
