"""Both chunk codecs end to end on a synthetic model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtc_vllm.codec.artifact import Geometry, RankArtifact
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.container import SectionKind, parse
from kvtc_vllm.codec.errors import ArtifactError, CodecError, ContainerError
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.codec.registry import CODECS, name_of
from kvtc_vllm.codec.transform import chunk_rows
from tests.codec.synthetic import SyntheticModel, plan_error

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, *FP8]
RATIOS = (4.0, 8.0, 16.0)
MODEL = SyntheticModel(
    num_layers=5, num_kv_heads=2, head_size=16, head_size_v=24, layer_groups=((0, 2), (2, 5))
)
IDENTITY = bytes(range(16))

pytestmark = pytest.mark.usefixtures("each_way")


@pytest.fixture(scope="module")
def artifact() -> RankArtifact:
    return MODEL.artifact(RATIOS)


@pytest.fixture(params=["raw", "kvtc"])
def codec(request, artifact, each_way) -> ChunkCodec:
    if request.param == "raw":
        return RawCodec(MODEL.geometry, torch.bfloat16, IDENTITY)
    return KvtcCodec(artifact, 8.0, torch.bfloat16, IDENTITY)


def relative_error(decoded: torch.Tensor, original: torch.Tensor) -> float:
    return float((decoded - original).square().sum() / original.square().sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 17, 128])
def test_raw_is_bit_exact(dtype, tokens):
    k, v = MODEL.chunk(tokens, 9, 1, dtype)
    k[0, 0, 0, 0], v[0, 0, 0, 0] = float("nan"), float("inf")
    codec = RawCodec(MODEL.geometry, dtype)
    decoded = codec.decode(codec.encode(k, v, 9), 9, tokens)
    assert decoded.start == 9
    for stored, original in ((decoded.k, k), (decoded.v, v)):
        assert stored.dtype == dtype
        assert torch.equal(stored.view(torch.uint8), original.view(torch.uint8))


def test_raw_overhead_is_124_bytes():
    k, v = MODEL.chunk(16)
    blob = RawCodec(MODEL.geometry, torch.bfloat16).encode(k, v, 0)
    assert len(blob) == k.nbytes + v.nbytes + 124


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("ratio", RATIOS)
def test_kvtc_error_is_what_the_plan_predicts(artifact, dtype, ratio):
    start, tokens = 1000, 512
    k, v = MODEL.chunk(tokens, start, 5, dtype)
    codec = KvtcCodec(artifact, ratio, dtype)
    decoded = codec.decode(codec.encode(k, v, start))
    positions = torch.arange(start, start + tokens)
    for (group, kind), section in artifact.sections.items():
        x = chunk_rows(k, v, group, kind, artifact, positions) - section.mean
        y = chunk_rows(decoded.k, decoded.v, group, kind, artifact, positions) - section.mean
        plan = section.plans[ratio]
        error = relative_error(y, x)
        assert error == pytest.approx(plan_error(x, section.basis.float(), plan), rel=0.01)
        # Heavy tails: the error of 512 new rows is only roughly that of the fitted ones.
        assert error == pytest.approx(plan.predicted_error, rel=0.2)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 67, 128, 257])
@pytest.mark.parametrize("start", [0, 2, 4, 1000])
def test_kvtc_shapes_sinks_and_sections(artifact, tokens, start):
    k, v = MODEL.chunk(tokens, start, 2)
    codec = KvtcCodec(artifact, 4.0, torch.bfloat16, IDENTITY)
    blob = codec.encode(k, v, start)
    decoded = codec.decode(blob, start, tokens)
    assert (decoded.k.shape, decoded.v.shape) == (k.shape, v.shape)
    assert decoded.k.dtype == decoded.v.dtype == torch.bfloat16
    sinks = min(max(4 - start, 0), tokens)
    assert torch.equal(decoded.k[:sinks], k[:sinks])
    assert torch.equal(decoded.v[:sinks], v[:sinks])
    info = parse(blob)
    assert info.header.sinks == sinks
    coded = [(0, 0), (1, 0), (0, 1), (1, 1)] if sinks < tokens else []
    exact = [(int(SectionKind.SINKS), 0xFFFF)] if sinks else []
    assert [(s.kind, s.group) for s in info.sections] == exact + coded
    if sinks < tokens:
        assert relative_error(decoded.k[sinks:].float(), k[sinks:].float()) < 0.3
        assert relative_error(decoded.v[sinks:].float(), v[sinks:].float()) < 0.3


def test_4096_tokens(artifact):
    k, v = MODEL.chunk(4096, 0)
    codec = KvtcCodec(artifact, 16.0, torch.bfloat16)
    blob = codec.encode(k, v, 0)
    assert relative_error(codec.decode(blob).v.float(), v.float()) < 0.4
    assert (k.nbytes + v.nbytes) / len(blob) > 16.0


def test_encoding_is_deterministic(codec):
    k, v = MODEL.chunk(128, 0, 3)
    blob = codec.encode(k, v, 0)
    assert codec.encode(k.clone(), v.clone(), 0) == blob
    first, second = codec.decode(blob), codec.decode(bytearray(blob))
    assert torch.equal(first.k, second.k)
    assert torch.equal(first.v, second.v)


def test_strides_do_not_matter(codec):
    k, v = MODEL.chunk(32, 0, 3)
    scattered_k = k.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    scattered_v = v.transpose(0, 1).contiguous().transpose(0, 1)
    assert not scattered_k.is_contiguous()
    assert codec.encode(scattered_k, scattered_v, 0) == codec.encode(k, v, 0)


def test_encode_leaves_its_input_alone(codec):
    k, v = MODEL.chunk(32, 0, 3)
    k_before, v_before = k.clone(), v.clone()
    codec.encode(k, v, 0)
    assert torch.equal(k, k_before)
    assert torch.equal(v, v_before)


def test_groups_one_at_a_time_are_the_whole(codec):
    k, v = MODEL.chunk(64, 0, 4)
    blob = codec.encode(k, v, 0)
    whole = codec.decode(blob)
    groups = list(codec.decode_groups(blob, 0, 64))
    assert [(g.first_layer, g.end_layer) for g in groups] == [(0, 2), (2, 5)]
    assert torch.equal(torch.cat([g.k for g in groups], dim=1), whole.k)
    assert torch.equal(torch.cat([g.v for g in groups], dim=1), whole.v)


def test_decode_groups_verifies_before_it_is_iterated(codec):
    blob = codec.encode(*MODEL.chunk(8), 0)
    with pytest.raises(ContainerError):
        codec.decode_groups(blob, expect_tokens=9)


def test_other_ratios_of_the_artifact_decode(artifact):
    k, v = MODEL.chunk(64, 64)
    blob = KvtcCodec(artifact, 4.0, torch.bfloat16).encode(k, v, 64)
    as_written = KvtcCodec(artifact, 4.0, torch.bfloat16).decode(blob)
    by_other = KvtcCodec(artifact, 16.0, torch.bfloat16).decode(blob)
    assert torch.equal(by_other.k, as_written.k)


def refused(codec: ChunkCodec, blob: bytes, reason: str, **expect: int) -> None:
    with pytest.raises(ContainerError) as caught:
        codec.decode(blob, **expect)
    assert caught.value.reason == reason


def test_blobs_of_another_setting_are_refused(codec, artifact):
    blob = codec.encode(*MODEL.chunk(64), 0)
    rebuild = {
        "raw": lambda **kw: RawCodec(
            **{"geometry": MODEL.geometry, "dtype": torch.bfloat16, "identity": IDENTITY} | kw
        ),
        "kvtc": lambda **kw: KvtcCodec(
            **{"artifact": artifact, "ratio": 8.0, "dtype": torch.bfloat16, "identity": IDENTITY}
            | kw
        ),
    }[codec.name]
    refused(rebuild(identity=bytes(16)), blob, "fingerprint")
    refused(rebuild(dtype=torch.float16), blob, "geometry")
    refused(codec, blob, "geometry", expect_start=1)
    refused(codec, blob, "geometry", expect_tokens=63)
    other = {"raw": KvtcCodec(artifact, 8.0, torch.bfloat16, IDENTITY)}
    other["kvtc"] = RawCodec(MODEL.geometry, torch.bfloat16, IDENTITY)
    refused(other[codec.name], blob, "version")


def test_blobs_of_another_artifact_are_refused(artifact):
    blob = KvtcCodec(artifact, 8.0, torch.bfloat16).encode(*MODEL.chunk(64), 0)
    other = replace(artifact, fingerprint=bytes(16))
    refused(KvtcCodec(other, 8.0, torch.bfloat16), blob, "fingerprint")
    without_sinks = replace(artifact, sink_tokens=0)
    refused(KvtcCodec(without_sinks, 8.0, torch.bfloat16), blob, "geometry")
    fewer = replace(
        artifact,
        sections={
            key: replace(s, plans={r: p for r, p in s.plans.items() if r != 8.0})
            for key, s in artifact.sections.items()
        },
    )
    refused(KvtcCodec(fewer, 4.0, torch.bfloat16), blob, "geometry")


def test_geometry_is_compared():
    blob = RawCodec(MODEL.geometry, torch.bfloat16).encode(*MODEL.chunk(4), 0)
    g = MODEL.geometry
    swapped = Geometry(g.num_layers, g.num_kv_heads, g.head_size_v, g.head_size, g.layer_groups)
    refused(RawCodec(swapped, torch.bfloat16), blob, "geometry")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("token", [0, 63])
def test_non_finite_chunks_are_not_coded(artifact, value, where, token):
    k, v = MODEL.chunk(64)
    (k if where == "k" else v)[token, 1, 1, 7] = value
    with pytest.raises(CodecError, match="non-finite"):
        KvtcCodec(artifact, 8.0, torch.bfloat16).encode(k, v, 0)


def test_coefficients_outside_float16_are_not_coded(artifact):
    k, v = MODEL.chunk(64)
    v[10] = 60000.0
    with pytest.raises(CodecError, match="float16 range"):
        KvtcCodec(artifact, 8.0, torch.bfloat16).encode(k, v, 0)


def test_positions_outside_the_rope_table(artifact):
    k, v = MODEL.chunk(8, 8184)
    codec = KvtcCodec(artifact, 8.0, torch.bfloat16)
    codec.decode(codec.encode(k, v, 8184))
    with pytest.raises(CodecError, match="RoPE table of 8192"):
        codec.encode(k, v, 8185)


def test_wrong_tensors_are_programming_errors(codec):
    k, v = MODEL.chunk(8)
    with pytest.raises(ValueError, match="k is"):
        codec.encode(k[:, 1:], v, 0)
    with pytest.raises(ValueError, match="v is"):
        codec.encode(k, v[:7], 0)
    with pytest.raises(ValueError, match="k is"):
        codec.encode(k.float(), v.float(), 0)
    with pytest.raises(ValueError, match="from position -1"):
        codec.encode(k, v, -1)
    with pytest.raises(ValueError, match="0 tokens"):
        codec.encode(k[:0], v[:0], 0)


def test_wrong_constructor_arguments(artifact):
    with pytest.raises(ValueError, match="float8_e4m3fnuz"):
        RawCodec(MODEL.geometry, torch.float8_e4m3fnuz)
    with pytest.raises(ValueError, match="16 bytes, not 3"):
        RawCodec(MODEL.geometry, torch.bfloat16, b"abc")
    exchanged = {**artifact.sections, (0, "k"): artifact.sections[0, "v"]}
    of_v = "scales of v must be a positive float32 for every layer"
    for change, message in (
        ({"fingerprint": b"short"}, "fingerprint of 5 bytes"),
        ({"sections": {}}, r"sections \[\] are not"),
        ({"sections": exchanged}, "mean or basis of section 0k is not for rows of"),
        ({"scales": {"k": torch.ones(5)}}, r"scales are of \['k'\], not of k and v"),
        ({"scales": {"k": torch.ones(5), "v": torch.ones(4)}}, of_v),
        ({"scales": {"k": torch.ones(5), "v": torch.ones(5).double()}}, of_v),
        ({"scales": {"k": torch.ones(5), "v": torch.zeros(5)}}, of_v),
        ({"scales": {"k": torch.ones(5), "v": torch.full((5,), float("inf"))}}, of_v),
    ):
        with pytest.raises(ArtifactError, match=message):
            KvtcCodec(replace(artifact, **change), 8.0, torch.bfloat16)
    for layer_rope in ((0,), (1,) * 5, (0, None, -1, 0, 0)):
        with pytest.raises(ValueError, match="layer_rope"):
            replace(artifact, layer_rope=layer_rope)
    with pytest.raises(ArtifactError, match=r"ratio 5\.0"):
        KvtcCodec(artifact, 5.0, torch.bfloat16)


def test_layers_without_rotation(artifact):
    """They are coded as a rotating model's keys are once these have been turned back."""
    mixed = replace(artifact, layer_rope=(0, None, 0, 0, None))
    k, v = (x.float() for x in MODEL.chunk(64, 64))
    still = [1, 4]
    turned_back = k.clone()
    turned_back[:, still] = unrotated(k, v, artifact)[:, still]
    expected = KvtcCodec(artifact, 4.0, torch.float32)
    expected = expected.decode(expected.encode(k, v, 64))
    codec = KvtcCodec(mixed, 4.0, torch.float32)
    found = codec.decode(codec.encode(turned_back, v, 64))
    moved = [0, 2, 3]
    assert torch.allclose(found.k[:, moved], expected.k[:, moved], atol=1e-4)
    back = unrotated(expected.k, expected.v, artifact)
    assert torch.allclose(found.k[:, still], back[:, still], atol=1e-4)
    assert not torch.allclose(found.k[:, still], expected.k[:, still], atol=1e-1)


def unrotated(k, v, artifact):
    """Keys [64, L, H, D] of tokens 64 to 127 as rows have them."""
    positions = torch.arange(64, 128)
    groups = range(len(artifact.geometry.layer_groups))
    rows = [chunk_rows(k, v, group, "k", artifact, positions) for group in groups]
    return torch.cat([of_group.view(64, -1, 2, 16) for of_group in rows], dim=1)


def test_registry():
    numbers = [spec.codec_id for spec in CODECS.values()]
    assert len(set(numbers)) == len(numbers)
    assert {name_of(spec.codec_id): name for name, spec in CODECS.items()} == {n: n for n in CODECS}
    assert (CODECS["raw"].codec_id, CODECS["kvtc"].codec_id) == (0, 1)  # written into blobs


def test_a_blob_decodes_only_under_its_own_name() -> None:
    model = SyntheticModel()
    artifact = model.artifact((8.0,))
    k, v = model.chunk(32)
    for codec in (
        RawCodec(artifact.geometry, torch.bfloat16, bytes(range(16))),
        KvtcCodec(artifact, 8.0, torch.bfloat16, bytes(range(16))),
    ):
        blob = codec.encode(k, v, 128, key=b"mine")
        assert codec.decode(blob, key=b"mine").start == 128
        for other in (b"", b"yours", b"mine\0"):
            with pytest.raises(ContainerError) as caught:
                codec.decode(blob, key=other)
            assert caught.value.reason == "fingerprint"
