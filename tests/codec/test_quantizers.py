"""Quantisers against a scalar restatement of their formulas, and their error bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtc_vllm.codec.quantizers import (
    BY_TYPE_ID,
    REGISTRY,
    SHIFT_SCALE_BITS,
    group_cost_bits,
)

F32 = np.float32
FP16_MAX = 65504.0
ALL = [pytest.param(q, id=q.name) for q in REGISTRY.values()]
INTEGER = [pytest.param(REGISTRY[name], id=name) for name in ("int2", "int4")]

finite = st.floats(-60000.0, 60000.0, width=32)
groups = st.lists(finite, min_size=1, max_size=40)


def as_group(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def fp16(x: float) -> np.float32:
    return F32(np.float16(np.clip(F32(x), -FP16_MAX, FP16_MAX)))


def scalar_uniform(values: list[float], bits: int) -> tuple[list[int], float, float]:
    """The formula of FORMAT.md, one element at a time in float32."""
    x = [F32(v) for v in values]
    top = F32(2**bits - 1)
    shift = fp16(min(x))
    scale = fp16(max(max(x) - shift, F32(0)) / top) if max(x) > min(x) else F32(0)
    if scale == 0:
        return [0] * len(x), float(shift), 0.0
    codes = [int(np.clip(np.rint((v - shift) / scale), 0, top)) for v in x]
    return codes, float(shift), float(scale)


@pytest.mark.parametrize("quantizer", INTEGER)
@given(values=groups)
@settings(max_examples=150)
def test_integer_codes_are_the_formula(quantizer, values):
    codes, shift, scale = quantizer.quantize(as_group(values))
    assert (codes.tolist(), float(shift), float(scale)) == scalar_uniform(values, quantizer.bits)


@pytest.mark.parametrize("quantizer", INTEGER)
@given(values=groups)
def test_integer_error_is_half_a_step(quantizer, values):
    x = as_group(values)
    codes, shift, scale = quantizer.quantize(x)
    error = (quantizer.dequantize(codes, shift, scale) - x).abs().max()
    # Beyond half a step: elements outside [shift, shift + top * scale], because shift was
    # rounded up or scale down to float16 (11 significant bits, or 2^-25 absolute).
    rounding = 2**-11 * (abs(float(shift)) + x.max() - x.min()) + 2**-20
    assert error <= 0.5 * float(scale) * 1.0001 + rounding


@given(values=groups)
def test_fp8_error_is_a_sixteenth_of_the_distance_to_the_middle(values):
    x = as_group(values)
    codes, shift, scale = REGISTRY["fp8"].quantize(x)
    error = (REGISTRY["fp8"].dequantize(codes, shift, scale) - x).abs()
    distance = (x - shift.float()).abs()
    rounding = 2**-11 * (abs(float(shift)) + x.max() - x.min()) + 2**-20
    if float(scale) < 2**-14:
        # A subnormal scale is rounded by up to 2^-25 absolute, and the outermost code is 448 of it.
        rounding += 448 * 2**-25
    assert bool((error <= distance / 16 + float(scale) * 2**-10 + rounding).all())


@pytest.mark.parametrize("quantizer", ALL)
@given(values=groups)
def test_codes_fit_their_bits_and_nothing_is_nan(quantizer, values):
    codes, shift, scale = quantizer.quantize(as_group(values))
    assert codes.dtype == torch.uint8
    assert shift.dtype == scale.dtype == torch.float16
    assert int(codes.max()) < 2**quantizer.bits
    assert bool(torch.isfinite(quantizer.dequantize(codes, shift, scale)).all())


@pytest.mark.parametrize("quantizer", ALL)
@given(value=finite, size=st.integers(1, 20))
def test_a_constant_group_is_its_shift(quantizer, value, size):
    codes, shift, scale = quantizer.quantize(as_group([value] * size))
    assert codes.tolist() == [0] * size
    assert float(scale) == 0.0
    assert float(shift) == float(fp16(value))


@pytest.mark.parametrize("quantizer", ALL)
def test_values_outside_float16_saturate(quantizer):
    x = torch.tensor([-1e30, 0.0, 1e30])
    codes, shift, scale = quantizer.quantize(x)
    restored = quantizer.dequantize(codes, shift, scale)
    assert bool(torch.isfinite(restored).all())
    assert restored[0] < restored[2]


@pytest.mark.parametrize("quantizer", ALL)
def test_tiny_ranges_collapse_to_the_shift(quantizer):
    """A range whose scale rounds to zero in float16 (below 2^-25) is not divided by."""
    codes, shift, scale = quantizer.quantize(torch.tensor([0.0, 2.0**-30]))
    assert float(scale) == 0.0
    assert quantizer.dequantize(codes, shift, scale).tolist() == [0.0, 0.0]


def test_shift_and_scale_are_rounded_before_use():
    x = torch.tensor([1000.3, 1000.9, 1003.6])
    codes, shift, scale = REGISTRY["int4"].quantize(x)
    assert float(shift) == 1000.5
    expected = torch.round((x - 1000.5) / float(scale)).clamp(0, 15)
    assert codes.tolist() == expected.tolist()


@pytest.mark.parametrize("quantizer", ALL)
def test_groups_of_a_batch_do_not_influence_each_other(quantizer):
    x = torch.randn(7, 5, 16, generator=torch.Generator().manual_seed(1))
    codes, shift, scale = quantizer.quantize(x)
    for t in range(7):
        alone = quantizer.quantize(x[t, 3])
        assert torch.equal(codes[t, 3], alone[0])
        assert (shift[t, 3], scale[t, 3]) == (alone[1], alone[2])


@pytest.mark.parametrize("quantizer", ALL)
def test_input_is_left_alone(quantizer):
    x = torch.randn(4, 16)
    before = x.clone()
    quantizer.quantize(x)
    assert torch.equal(x, before)


def test_fp8_reads_every_code_as_e4m3():
    codes = torch.arange(256, dtype=torch.uint8)
    one, zero = torch.tensor(1.0).half(), torch.tensor(0.0).half()
    values = REGISTRY["fp8"].dequantize(codes, zero, one)
    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.nan_to_num(), expected.nan_to_num())


def test_registry_numbers():
    assert {name: q.type_id for name, q in REGISTRY.items()} == {"int2": 1, "int4": 2, "fp8": 3}
    assert all(BY_TYPE_ID[q.type_id] is q for q in REGISTRY.values())
    assert group_cost_bits(2, 1) == 2 + SHIFT_SCALE_BITS == 34
