"""fp8 caches: scales, rounding, saturation, exact sinks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtc_vllm.codec.artifact import KINDS, RankArtifact
from kvtc_vllm.codec.base import DecodedChunk
from kvtc_vllm.codec.container import parse
from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.payload import magnitude
from kvtc_vllm.codec.transform import chunk_rows, rows_to_cache, to_cache
from tests.codec.synthetic import SyntheticModel

DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]
MODEL = SyntheticModel(
    num_layers=5, num_kv_heads=2, head_size=16, head_size_v=24, layer_groups=((0, 2), (2, 5))
)
RATIO = 8.0
# Largest relative error of rounding to nearest: half a step over the smallest value with it.
ROUNDING = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}

pytestmark = pytest.mark.usefixtures("each_way")


@pytest.fixture(scope="module")
def artifact() -> RankArtifact:
    return MODEL.artifact((RATIO,))


def some_scales(seed: int) -> dict[str, torch.Tensor]:
    """Scales from 1/16 to 4, one a layer, with which no value of the model saturates."""
    drawn = torch.Generator().manual_seed(seed)
    return {kind: 2 ** (6 * torch.rand(5, generator=drawn) - 4) for kind in KINDS}


def cached(
    artifact: RankArtifact, values: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values float32 [T, L, H, D] as an engine with these scales would store them."""
    scales = artifact.scales or {kind: torch.ones(5) for kind in KINDS}
    k, v = (
        to_cache(x, scales[kind][:, None, None], dtype)
        for kind, x in zip(KINDS, values, strict=True)
    )
    return k, v


def rows_of(artifact: RankArtifact, chunk: DecodedChunk | tuple, start: int) -> torch.Tensor:
    """Both kinds of both groups, side by side."""
    k, v = (chunk.k, chunk.v) if isinstance(chunk, DecodedChunk) else chunk
    positions = torch.arange(start, start + len(k))
    return torch.cat(
        [chunk_rows(k, v, group, kind, artifact, positions) for group in (0, 1) for kind in KINDS],
        dim=1,
    )


def relative_error(decoded: torch.Tensor, original: torch.Tensor, artifact: RankArtifact) -> float:
    mean = torch.cat([artifact.sections[group, kind].mean for group in (0, 1) for kind in KINDS])
    return float((decoded - original).square().sum() / (original - mean).square().sum())


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 1000), start=st.integers(0, 2000), tokens=st.integers(5, 90))
@settings(max_examples=15)
def test_rounding_to_fp8_adds_little_to_the_error(artifact, dtype, seed, start, tokens):
    """Against the same chunk in a float32 cache: both ways through fp8 add their rounding."""
    artifact = replace(artifact, scales=some_scales(seed))
    values = MODEL.chunk(tokens, start, seed, torch.float32)
    plain = replace(artifact, scales=None)
    wide = KvtcCodec(plain, RATIO, torch.float32)
    exact = rows_of(plain, values, start)
    lossy = rows_of(plain, wide.decode(wide.encode(*values, start)), start)
    floor = relative_error(lossy, exact, artifact)
    codec = KvtcCodec(artifact, RATIO, dtype)
    stored = cached(artifact, values, dtype)
    rounded = relative_error(rows_of(artifact, stored, start), exact, artifact)
    energy = relative_error(torch.zeros_like(exact), exact, artifact)
    assert 0 < rounded < ROUNDING[dtype] ** 2 * energy
    decoded = codec.decode(codec.encode(*stored, start), start, tokens)
    error = relative_error(rows_of(artifact, decoded, start), exact, artifact)
    assert error < (floor**0.5 + 2 * rounded**0.5) ** 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_only_change_the_unit(artifact, dtype):
    """Powers of two change no digit: the same chunk in other units decodes to the same values."""
    values = MODEL.chunk(32, 8, 1, torch.float32)
    decoded = {}
    for name, exponents in (("ones", [0] * 5), ("others", [-2, 2, 0, 1, -1])):
        scales = 2 ** torch.tensor(exponents, dtype=torch.float32)
        scaled = replace(artifact, scales={"k": scales, "v": scales.flip(0)})
        # Large enough that no element is among fp8's subnormals in either unit.
        stored = cached(scaled, tuple(8 * x.sign() * (1 + x.abs()) for x in values), dtype)
        codec = KvtcCodec(scaled, RATIO, dtype)
        decoded[name] = rows_of(scaled, codec.decode(codec.encode(*stored, 8)), 8)
    assert torch.allclose(decoded["ones"], decoded["others"], rtol=1e-5, atol=0.02)
    forgotten = replace(artifact, scales=None)
    assert not torch.allclose(
        rows_of(forgotten, stored, 8), rows_of(scaled, stored, 8), rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_beyond_the_largest_saturate(artifact, dtype):
    limit = torch.finfo(dtype).max
    scaled = replace(artifact, scales={kind: torch.full((5,), 0.5) for kind in KINDS})
    for kind in KINDS:
        rows = torch.empty(2, len(scaled.sections[0, kind].mean))
        rows[0], rows[1] = 0.75 * limit, -0.25 * limit
        # Position 0: RoPE turns by nothing.
        stored = rows_to_cache(rows, 0, kind, scaled, torch.zeros(2).long(), dtype).float()
        assert (stored[0] == limit).all()
        assert (stored[1] == -0.5 * limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_are_the_bytes_of_the_cache(artifact, dtype):
    scaled = replace(artifact, scales=some_scales(3))
    k, v = cached(scaled, MODEL.chunk(9, 0, 2, torch.float32), dtype)
    codes = torch.arange(5 * 2 * 16, dtype=torch.uint8) % 0x7C
    k[1] = codes.view(dtype).view(5, 2, 16)
    codec = KvtcCodec(scaled, RATIO, dtype)
    blob = codec.encode(k, v, 0)
    decoded = codec.decode(blob)
    assert parse(blob).header.dtype_code == {DTYPES[0]: 4, DTYPES[1]: 5}[dtype]
    for ours, theirs in ((decoded.k, k), (decoded.v, v)):
        assert torch.equal(ours[:4].view(torch.uint8), theirs[:4].view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_of_every_code(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    for code in codes:
        found, expected = magnitude(code[None]), abs(float(code.float()))
        assert found == expected or (found != found and expected != expected)
    finite = codes[codes.float().isfinite()]
    assert magnitude(finite) == torch.finfo(dtype).max
    assert not magnitude(codes) < float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("token", [0, 8])
def test_chunks_with_nan_are_not_coded(artifact, dtype, token):
    k, v = cached(artifact, MODEL.chunk(9, 0, 2, torch.float32), dtype)
    v[token, 1, 1, 7] = float("nan")
    with pytest.raises(CodecError, match="non-finite"):
        KvtcCodec(artifact, RATIO, dtype).encode(k, v, 0)
