"""The rotary embedding against complex arithmetic, and through the cache dtype and back."""

from __future__ import annotations

import math

import pytest
import torch

from kvtc_vllm.codec.rope import Rope

POSITIONS = 4096
HEAD_SIZE = 64


def plain_frequencies(dim: int, base: float = 10000.0) -> torch.Tensor:
    return base ** (-torch.arange(0, dim, 2).double() / dim)


def llama3_frequencies(dim: int) -> torch.Tensor:
    """Llama 3.1: factor 8, low/high frequency factors 1 and 4, original length 8192."""
    frequencies = plain_frequencies(dim, 500000.0)
    wavelengths = 2 * math.pi / frequencies
    smooth = ((8192 / wavelengths - 1) / (4 - 1)).clamp(0, 1)
    return (1 - smooth) * frequencies / 8 + smooth * frequencies


def yarn_frequencies(dim: int, factor: float = 4.0) -> torch.Tensor:
    """A ramp between interpolated and plain frequencies, as YaRN's."""
    frequencies = plain_frequencies(dim)
    ramp = (torch.arange(dim // 2).double() / (dim // 2) * 2 - 0.5).clamp(0, 1)
    return ramp * frequencies / factor + (1 - ramp) * frequencies


def table(frequencies: torch.Tensor, mscale: float = 1.0) -> torch.Tensor:
    """cat(cos, sin) * mscale rounded to bf16: what vLLM keeps for a bf16 model."""
    angles = torch.arange(POSITIONS).double()[:, None] * frequencies
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * mscale).to(torch.bfloat16)


TABLES = {
    "plain": table(plain_frequencies(HEAD_SIZE)),
    "llama3": table(llama3_frequencies(HEAD_SIZE)),
    "yarn": table(yarn_frequencies(HEAD_SIZE), mscale=0.1 * math.log(4.0) + 1.0),
    "partial": table(plain_frequencies(HEAD_SIZE // 2)),
}
ROPES = [
    pytest.param(Rope(cos_sin, neox), id=f"{name}-{'neox' if neox else 'gptj'}")
    for name, cos_sin in TABLES.items()
    for neox in (True, False)
]


def rotate_as_complex_numbers(keys: torch.Tensor, positions: torch.Tensor, rope: Rope):
    """(x1 + i x2) * (cos + i sin), in float64."""
    cos, sin = rope.cos_sin[positions].double().chunk(2, dim=-1)
    turn = torch.complex(cos, sin)[:, None]
    rotated = keys.double().clone()
    dim = rope.rotary_dim
    first = slice(0, dim // 2) if rope.neox else slice(0, dim, 2)
    second = slice(dim // 2, dim) if rope.neox else slice(1, dim, 2)
    result = torch.complex(rotated[..., first], rotated[..., second]) * turn
    rotated[..., first], rotated[..., second] = result.real, result.imag
    return rotated


@pytest.fixture
def keys() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(512, 8, HEAD_SIZE, generator=generator) * 3


@pytest.fixture
def positions() -> torch.Tensor:
    return torch.arange(1000, 1512)


@pytest.mark.parametrize("rope", ROPES)
def test_forward_is_complex_multiplication(rope, keys, positions):
    expected = rotate_as_complex_numbers(keys, positions, rope)
    torch.testing.assert_close(rope.apply(keys, positions).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope", ROPES)
def test_inverse_undoes_forward(rope, keys, positions):
    restored = rope.invert(rope.apply(keys, positions), positions)
    torch.testing.assert_close(restored, keys, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope", ROPES)
def test_bf16_cache_survives_the_detour(rope, keys, positions):
    cached = rope.apply(keys, positions).to(torch.bfloat16)
    returned = rope.apply(rope.invert(cached, positions), positions).to(torch.bfloat16)
    changed = (returned != cached).double().mean()
    assert changed <= 1e-4


def test_dimensions_past_rotary_dim_pass_through(keys, positions):
    rope = Rope(TABLES["partial"])
    assert torch.equal(rope.apply(keys, positions)[..., 32:], keys[..., 32:])
    assert torch.equal(rope.invert(keys, positions)[..., 32:], keys[..., 32:])


def test_layers_between_tokens_and_heads(positions):
    keys = torch.randn(512, 3, 2, HEAD_SIZE)
    rope = Rope(TABLES["llama3"])
    together = rope.apply(keys, positions)
    for layer in range(3):
        assert torch.equal(together[:, layer], rope.apply(keys[:, layer], positions))


def test_position_outside_the_table_is_an_error():
    rope = Rope(TABLES["plain"])
    with pytest.raises(ValueError, match="4096 positions"):
        rope.apply(torch.zeros(1, 1, HEAD_SIZE), torch.tensor([POSITIONS]))


def test_fingerprint_sees_every_number():
    rope = Rope(TABLES["plain"])
    altered = TABLES["plain"].clone()
    altered[-1, -1] += 0.5
    prints = {
        rope.fingerprint(),
        Rope(TABLES["plain"], neox=False).fingerprint(),
        Rope(altered).fingerprint(),
        Rope(TABLES["plain"].float()).fingerprint(),
    }
    assert len(prints) == 4
    assert rope.fingerprint() == Rope(TABLES["plain"].clone()).fingerprint()
