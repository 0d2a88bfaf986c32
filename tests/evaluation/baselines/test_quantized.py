"""fp8, KIVI and GEAR: sizes, error bounds, and which loses less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.evaluation.baselines.formats import pack_positions, unpack_positions
from kvtc_vllm.evaluation.baselines.fp8 import Fp8
from kvtc_vllm.evaluation.baselines.gear import Gear
from kvtc_vllm.evaluation.baselines.kivi import Kivi
from tests.evaluation.baselines.samples import (
    GEOMETRY,
    START,
    random_cache,
    relative_error,
    reload,
    structured_cache,
    views,
)

LAYER_HEADS = 5 * 2
SIZE, SIZE_V = GEOMETRY.head_size, GEOMETRY.head_size_v


def stored(method, tokens: int) -> int:
    return sum(map(len, method.compress(*random_cache(tokens, method.dtype), START)))


def test_fp8_takes_a_byte_an_element():
    assert stored(Fp8(GEOMETRY, torch.bfloat16), 33) == 33 * GEOMETRY.token_elements()


def test_fp8_rounds_to_three_bits_and_saturates():
    k, v = random_cache(50, torch.float32)
    k[0] = 1e6
    back, _ = reload(Fp8(GEOMETRY, torch.float32), k, v)
    assert (back[0] == 448.0).all()
    error = (back[1:] - k[1:]).abs()
    assert (error <= (k[1:].abs() / 16).clamp(min=2.0**-10)).all()


@pytest.mark.parametrize("tokens", [1, 32, 100, 896])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kivi_size(tokens, dtype):
    whole, rest = tokens // 32, tokens % 32
    group = 32 * 2 // 8 + 2 + 2
    keys = LAYER_HEADS * SIZE * (whole * group + rest * dtype.itemsize)
    values = LAYER_HEADS * tokens * (SIZE_V // 32) * group
    assert stored(Kivi(GEOMETRY, dtype), tokens) == keys + values


def test_kivi_error_is_half_a_step_of_the_group():
    k, v = random_cache(100, torch.float32)
    back_k, back_v = reload(Kivi(GEOMETRY, torch.float32), k, v)
    assert torch.equal(back_k[96:], k[96:])
    for original, back, dim in (
        (k[:96].view(3, 32, 5, 2, SIZE), back_k[:96].view(3, 32, 5, 2, SIZE), 1),
        (v.view(100, 5, 2, -1, 32), back_v.view(100, 5, 2, -1, 32), -1),
    ):
        low, high = original.amin(dim, keepdim=True), original.amax(dim, keepdim=True)
        # Beside half a step, the float16 rounding of the zero point and of three steps.
        rounding = (low.abs() + high - low) * 2.0**-11
        assert ((back - original).abs() <= (high - low) / 6 + rounding + 1e-6).all()


def test_heads_that_are_no_whole_groups_are_refused():
    odd = replace(GEOMETRY, head_size_v=24)
    for method in (Kivi, Gear):
        with pytest.raises(ValueError, match="whole groups"):
            method(odd, torch.bfloat16)


@pytest.mark.parametrize("share", [0.0, 0.02])
@pytest.mark.parametrize("tokens", [2, 64, 300, 896])
def test_gear_size(tokens, share):
    whole, rest = tokens // 64 * 64, tokens % 64
    group = 64 * 2 // 8 + 2 + 2

    def section(vectors: int, length: int, rows: int, size: int) -> int:
        outliers = vectors * 2 * int(length * share / 2)
        low_rank = LAYER_HEADS * min(4, rows) * (rows + size) * 2
        positions = (outliers * (length - 1).bit_length() + 7) // 8
        return vectors * length // 64 * group + low_rank + outliers * 2 + positions

    keys = section(LAYER_HEADS * SIZE, whole, whole, SIZE) if whole else 0
    values = section(tokens * 5, 2 * SIZE_V, tokens, SIZE_V)
    tail = LAYER_HEADS * SIZE * rest * 2
    method = Gear(GEOMETRY, torch.bfloat16, outliers=share)
    assert stored(method, tokens) == keys + values + tail


def test_gear_keeps_outliers_exactly():
    k, v = structured_cache(256)
    back, _ = reload(Gear(GEOMETRY, torch.bfloat16), k, v)
    for largest in (True, False):
        ends = k.float().topk(2, dim=0, largest=largest).indices  # 1 % of 256 tokens
        assert torch.equal(back.gather(0, ends), k.gather(0, ends))


def test_gear_loses_less_than_kivi_and_each_part_helps():
    k, v = structured_cache(512)
    dtype = torch.bfloat16

    def errors(method) -> list[float]:
        restored = method.restore(views(method.compress(k, v, START)), len(k), START)
        return [relative_error(*pair) for pair in zip(restored, (k, v), strict=True)]

    # 4 %, because 1 % of this geometry's 64 values a token is less than one.
    full = errors(Gear(GEOMETRY, dtype, outliers=0.04))
    without_outliers = errors(Gear(GEOMETRY, dtype, outliers=0.0))
    kivi = errors(Kivi(GEOMETRY, dtype))
    for gear, gear_l, other in zip(full, without_outliers, kivi, strict=True):
        assert gear < gear_l
        assert gear < other


def test_heads_of_128_come_to_the_ratios_of_the_docstring():
    geometry = Geometry(1, 8, 128, 128, ((0, 1),))
    k = torch.randn(4096, 1, 8, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    for share, ratio in ((0.02, 4.5), (0.0, 5.3)):
        parts = Gear(geometry, torch.bfloat16, outliers=share).compress(k, k, 0)
        assert 2 * k.nbytes / sum(map(len, parts)) == pytest.approx(ratio, abs=0.06)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 65, 896])
def test_positions_pack_to_the_bits_they_need(length):
    positions = torch.randint(0, length, (3, 5), generator=torch.Generator().manual_seed(0))
    packed = pack_positions(positions, length)
    assert len(packed) == (15 * (length - 1).bit_length() + 7) // 8
    assert torch.equal(unpack_positions(memoryview(packed), length, (3, 5)), positions)
