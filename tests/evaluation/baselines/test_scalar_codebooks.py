"""TurboQuant and QuantSpec: sizes, and small cases worked out by hand."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.evaluation.baselines.quantspec import QuantSpec4, QuantSpec8
from kvtc_vllm.evaluation.baselines.turboquant import (
    TurboQuant3,
    TurboQuant4,
    code_vectors,
    codebook_of,
    read_vectors,
    rotation_of,
)
from kvtc_vllm.evaluation.baselines.turboquant_outliers import TurboQuant25, TurboQuant35
from tests.evaluation.baselines.samples import GEOMETRY, START, random_cache, reload, views

LAYER_HEADS = 5 * 2
SIZE, SIZE_V = GEOMETRY.head_size, GEOMETRY.head_size_v
ONE = Geometry(1, 1, 4, 4, ((0, 1),))


def stored(method, tokens: int) -> int:
    return sum(map(len, method.compress(*random_cache(tokens, method.dtype), START)))


@pytest.mark.parametrize("method", [TurboQuant4, TurboQuant3])
@pytest.mark.parametrize("tokens", [1, 100, 128])
def test_turboquant_size(method, tokens):
    vectors = LAYER_HEADS * tokens
    codes = sum(vectors * size * method.bits // 8 for size in (SIZE, SIZE_V))
    assert stored(method(GEOMETRY, torch.bfloat16), tokens) == codes + 2 * vectors * 2


def test_the_codebook_is_that_of_a_normal_coordinate_in_many_dimensions():
    # Lloyd-Max of a normal variable (Max, 1960): the positive values of 4 and of 8 levels.
    for bits, levels in ((2, (0.4528, 1.510)), (3, (0.2451, 0.7560, 1.344, 2.152))):
        scaled = codebook_of(1024, bits) * 32
        assert torch.allclose(scaled, -scaled.flip(0), atol=2e-3)
        assert scaled[len(scaled) // 2 :].tolist() == pytest.approx(levels, rel=5e-3)


@pytest.mark.parametrize("bits", [3, 4])
def test_keys_are_coded_as_in_vllm(bits):
    """Its codebook and the bytes of a key. It takes a coordinate for normal, which one of a unit
    vector of 64 elements nearly is; it has zero point and scale for values where we have a norm."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import solve_lloyd_max
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    theirs, _ = solve_lloyd_max(64, bits)
    assert torch.allclose(codebook_of(64, bits), theirs, rtol=0.05, atol=1e-3)
    config = TurboQuantConfig(head_dim=64, key_quant_bits=bits, value_quant_bits=bits)
    codes, norms = code_vectors(torch.ones(1, 64), bits)
    assert len(codes) + len(norms) == config.key_packed_size == config.value_packed_size - 2


def test_the_rotation_keeps_norms():
    rotation = rotation_of(64)
    assert torch.allclose(rotation @ rotation.T, torch.eye(64), atol=1e-5)


def test_turboquant_gives_norms_back_and_what_lies_on_the_codebook():
    codebook, rotation = codebook_of(SIZE, 3), rotation_of(SIZE)
    codes = torch.arange(3 * 5 * 2 * SIZE).view(3, 5, 2, SIZE) * 7 % 8
    unit = codebook[codes] / codebook[codes].norm(dim=-1, keepdim=True)
    k = 8.0 * unit @ rotation.T
    v = random_cache(3, torch.float32)[1]
    back, back_v = reload(TurboQuant3(GEOMETRY, torch.float32), k, v)
    assert torch.allclose(back.norm(dim=-1), torch.full((3, 5, 2), 8.0), rtol=1e-3)
    # These codes are spread evenly, so their norm is not 1 and some fall next to a border.
    assert ((back - k).norm(dim=-1) < 2.0).all()
    assert torch.allclose(back_v.norm(dim=-1), v.norm(dim=-1), rtol=1e-3)


@pytest.mark.parametrize("method", [TurboQuant25, TurboQuant35])
@pytest.mark.parametrize("tokens", [1, 100, 128])
def test_size_with_outlier_channels(method, tokens):
    """The paper's shares: 2.25 and 3.5 bits per element, two norms, a bit per channel."""
    per_element = {TurboQuant25: 9, TurboQuant35: 14}[method]
    vectors = LAYER_HEADS * tokens
    codes = sum(vectors * size * per_element // 32 for size in (SIZE, SIZE_V))
    masks = LAYER_HEADS * (SIZE + SIZE_V) // 8
    assert stored(method(GEOMETRY, torch.bfloat16), tokens) == codes + 2 * 2 * vectors * 2 + masks


def test_outlier_channels_are_a_code_of_their_own():
    """Channels 1, 5, 6 of 12 are ten times as large. They come back as TurboQuant in 3 bits has a
    vector of these three, the others as it has one of nine in 2 bits."""
    size, large = 12, [1, 5, 6]
    small = [channel for channel in range(size) if channel not in large]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 1, size, generator=generator)
    x[..., large] *= 10.0
    back, _ = reload(TurboQuant25(Geometry(1, 1, size, size, ((0, 1),)), torch.float32), x, x)
    for channels, bits in ((large, 3), (small, 2)):
        alone = x[..., channels]
        parts = code_vectors(alone, bits)
        expected = read_vectors(views(parts), tuple(alone.shape), bits)
        assert torch.allclose(back[..., channels], expected)


def test_heads_too_small_for_outlier_channels_are_refused():
    with pytest.raises(ValueError, match="too small"):
        TurboQuant25(Geometry(1, 1, 8, 8, ((0, 1),)), torch.float32)


@pytest.mark.parametrize("method", [QuantSpec8, QuantSpec4])
@pytest.mark.parametrize("tokens", [1, 100, 128, 200])
def test_quantspec_size(method, tokens):
    groups = LAYER_HEADS * (SIZE * -(-tokens // 128) + tokens)
    codes = method.levels * tokens * GEOMETRY.token_elements() // 2
    assert stored(method(GEOMETRY, torch.bfloat16), tokens) == codes + groups * 4


def test_quantspec_by_hand():
    # A step of 1 from 0 to 15: upper codes 0, 3, 7, 15. Of 3.3 and 6.9 the lower level has
    # 0.3 and -0.1 left, 4.8 and -1.6 of its steps of 1/16.
    v = torch.tensor([0.0, 3.3, 6.9, 15.0]).view(1, 1, 1, 4)
    upper, both = (
        reload(method(ONE, torch.float32), v, v)[1].flatten().tolist()
        for method in (QuantSpec4, QuantSpec8)
    )
    assert upper == [0.0, 3.0, 7.0, 15.0]
    assert both == [0.0, 3.0 + 5 / 16, 7.0 - 2 / 16, 15.0]


def test_the_upper_level_is_the_same_with_and_without_the_lower():
    k, v = random_cache(100, torch.bfloat16)
    alone = QuantSpec4(GEOMETRY, torch.bfloat16).compress(k, v, START)
    both = QuantSpec8(GEOMETRY, torch.bfloat16).compress(k, v, START)
    assert [both[0], *both[2:5], *both[6:]] == alone
    assert len(views(both)) == len(alone) + 2


def test_quantspec_error_is_half_a_lower_step():
    k, v = random_cache(128, torch.float32)
    back, _ = reload(QuantSpec8(GEOMETRY, torch.float32), k, v)
    spread = k.amax(0) - k.amin(0)
    # The lower level ends at 7 of its steps, half a step before the next upper code.
    assert ((back - k).abs() <= spread / 15 / 16 * 1.01 + 1e-3 * k.abs().amax(0)).all()
