"""Marked sinks: found by the rule, coded by finer steps, named in the blob."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvtc_vllm.codec.artifact import RankArtifact, at_ratio
from kvtc_vllm.codec.base import DecodedChunk, NewChunk, StoredChunk
from kvtc_vllm.codec.container import (
    CHECKSUM_BYTES,
    SectionKind,
    checksum,
    parse,
)
from kvtc_vllm.codec.cpu.codec import CpuKvtc2Codec
from kvtc_vllm.codec.cpu.products import has_int8_products
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.marks import marks_length, pack_marks, unpack_marks
from kvtc_vllm.codec.registry import max_blob_bytes, open_codec
from kvtc_vllm.codec.sink_rule import SinkRule
from tests.codec.synthetic import SyntheticModel
from tests.codec.v2.made_up import step_artifact

MODEL = SyntheticModel(
    num_layers=3, num_kv_heads=2, head_size=16, head_size_v=24, layer_groups=((0, 2), (2, 3))
)
RULE = SinkRule(layers=(1, 2), threshold=-1.0, max_share=0.05)
Chunk = tuple[torch.Tensor, torch.Tensor]
WAYS = pytest.mark.parametrize("fast", [True, False], ids=["fast", "reference"])


class Codecs:
    """Of artifacts whose K and V have a basis each, or share one."""

    def __init__(self, paired: bool) -> None:
        self.paired = paired

    def artifact(self, rule: SinkRule | None = RULE) -> RankArtifact:
        return step_artifact(MODEL, (4.0, 8.0), rule, paired=self.paired)

    def __call__(
        self, fast: bool, rule: SinkRule | None = RULE, ratio: float = 8.0
    ) -> TransformCodec:
        artifact = self.artifact(rule)
        return open_codec("kvtc2", torch.bfloat16, artifact=artifact, ratio=ratio, fast=fast)


@pytest.fixture(params=[False, True], ids=["apart", "paired"])
def codec_of(request: pytest.FixtureRequest) -> Codecs:
    return Codecs(request.param)


def chunk_with_sinks(tokens: int, start: int, sinks: list[int]) -> Chunk:
    """Values of the sinks are small in the layers of the rule."""
    k, v = MODEL.chunk(tokens, start, seed=3)
    v[sinks, 1:] *= 2.0**-9
    return k, v


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 128])
def test_bitmap(tokens: int) -> None:
    marks = torch.arange(tokens) % 3 == 1
    bitmap = pack_marks(marks)
    assert len(bitmap) == marks_length(tokens)
    assert torch.equal(unpack_marks(bitmap, tokens), marks)
    assert pack_marks(torch.tensor([True] + 7 * [False] + [False, True])) == b"\x01\x02"
    if tokens % 8:
        with pytest.raises(ContainerError) as caught:
            unpack_marks(bytes(len(bitmap) - 1) + b"\x80", tokens)
        assert caught.value.reason == "bounds"


@WAYS
@pytest.mark.parametrize(("start", "tokens"), [(0, 100), (2, 60), (256, 128)])
def test_sinks_are_marked_and_finer(codec_of: Codecs, fast: bool, start: int, tokens: int) -> None:
    codec, plain = codec_of(fast), codec_of(fast, None)
    exact = max(0, 4 - start)
    sinks = [exact + 5, tokens - 1]
    k, v = chunk_with_sinks(tokens, start, sinks)
    blob = codec.encode(k, v, start)
    section = next(s for s in parse(blob).sections if s.kind == SectionKind.MARKS)
    bitmap = blob[section.offset : section.offset + section.stored_length]
    marked = unpack_marks(bitmap, tokens - exact).nonzero().flatten() + exact
    assert marked.tolist() == sinks
    errors = []
    for each in (codec, plain):
        back = each.decode(each.encode(k, v, start), start, tokens).k.float()
        errors.append((back - k.float()).square().sum((1, 2, 3)))
    finer, coarse = errors
    # Sixteen times less error but for what no plan codes; plans for other tokens differ a little.
    assert (finer[sinks] < 0.25 * coarse[sinks]).all()
    others = [t for t in range(exact, tokens) if t not in sinks]
    assert float(finer[others].sum()) == pytest.approx(float(coarse[others].sum()), rel=0.4)


@WAYS
def test_at_most_the_rule_s_share_is_marked(codec_of: Codecs, fast: bool) -> None:
    k, v = chunk_with_sinks(64, 128, list(range(10, 20)))
    section = parse(codec_of(fast).encode(k, v, 128)).sections[0]
    assert section.kind == SectionKind.MARKS
    blob = codec_of(fast).encode(k, v, 128)
    bitmap = blob[section.offset : section.offset + section.stored_length]
    assert int(unpack_marks(bitmap, 64).sum()) == 4


@WAYS
def test_each_way_reads_the_other_s(codec_of: Codecs, fast: bool) -> None:
    k, v = chunk_with_sinks(128, 128, [3, 77])
    blob = codec_of(fast).encode(k, v, 128)
    here, there = codec_of(fast).decode(blob), codec_of(not fast).decode(blob)
    for a, b in ((here.k, there.k), (here.v, there.v)):
        difference = (a.float() - b.float()).square().sum()
        assert float(difference) < 1e-3 * float(a.float().square().sum())


@pytest.mark.parametrize("int8", [False, has_int8_products()])
def test_marked_tokens_of_a_batch_go_to_their_chunks(codec_of: Codecs, int8: bool) -> None:
    """Their products are of all chunks together, of which some have no marks."""
    codec = CpuKvtc2Codec(codec_of.artifact(), 8.0, torch.bfloat16, int8=int8)
    sinks = ([3, 77], [], [5], [0, 63, 127])
    new = [
        NewChunk(*chunk_with_sinks(128, 128 * i, own), 128 * i) for i, own in enumerate(sinks, 1)
    ]
    alone = [codec.decode(codec.encode(chunk.k, chunk.v, chunk.start)) for chunk in new]
    together = codec.decode_many([StoredChunk(blob) for blob in codec.encode_many(new)])
    for wanted, found, chunk, own in zip(alone, together, new, sinks, strict=True):
        assert isinstance(found, DecodedChunk)
        for a, b in ((found.k, wanted.k), (found.v, wanted.v)):
            difference = (a.float() - b.float()).square().sum()
            assert float(difference) < 1e-4 * float(b.float().square().sum())
        for a, b in ((found.k[own], chunk.k[own]), (found.v[own], chunk.v[own])):
            difference = (a.float() - b.float()).square().sum()
            assert float(difference) <= 0.02 * float(b.float().square().sum())


@WAYS
def test_only_sinks_at_the_front_leave_nothing_to_mark(codec_of: Codecs, fast: bool) -> None:
    codec = codec_of(fast)
    k, v = MODEL.chunk(2, 1)
    blob = codec.encode(k, v, 1)
    assert [s.kind for s in parse(blob).sections] == [SectionKind.SINKS]
    assert torch.equal(codec.decode(blob).k, k)


@WAYS
@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("a set padding bit", lambda blob, at: blob.__setitem__(at + 1, 0x80), "bounds"),
        ("other marks", lambda blob, at: blob.__setitem__(at, 0xFF), "bounds"),
        ("no marks", lambda blob, at: blob.__setitem__(at, 0), "bounds"),
    ],
)
def test_resealed_marks(
    codec_of: Codecs, fast: bool, name: str, damage: Callable[[bytearray, int], None], reason: str
) -> None:
    """Marked tokens have coefficients of their own, as many as there are marks."""
    codec = codec_of(fast)
    assert all(s.plans[8.0].beyond for s in codec.artifact.sections.values())
    k, v = chunk_with_sinks(12, 128, [5])
    blob = bytearray(codec.encode(k, v, 128))
    damage(blob, parse(blob).sections[0].offset)
    blob[-CHECKSUM_BYTES:] = checksum(bytes(blob[:-CHECKSUM_BYTES]))
    with pytest.raises(ContainerError) as caught:
        codec.decode(blob)
    assert caught.value.reason == reason


@WAYS
def test_blobs_with_and_without_marks_are_apart(codec_of: Codecs, fast: bool) -> None:
    """Fingerprints differ in real artifacts; here only the sections do."""
    k, v = MODEL.chunk(16, 128)
    for writer, reader in ((RULE, None), (None, RULE)):
        blob = codec_of(fast, writer).encode(k, v, 128)
        with pytest.raises(ContainerError) as caught:
            codec_of(fast, reader).decode(blob)
        assert caught.value.reason == "geometry"


@WAYS
def test_sizes_are_bounded_with_marks(codec_of: Codecs, fast: bool) -> None:
    """Of chunks that are twice as large as usual, and more; a codec may refuse them."""
    codec = codec_of(fast)
    kept = 0
    for tokens in (1, 9, 128):
        bound = max_blob_bytes(
            "kvtc2",
            torch.bfloat16,
            tokens,
            geometry=MODEL.geometry,
            sink_tokens=4,
            ratio=codec.ratio,
        )
        assert codec.max_blob_bytes(tokens) <= bound
        for start in (0, 256):
            k, v = chunk_with_sinks(tokens, start, [tokens - 1])
            for louder in (1, 2, 4, 8):
                (made,) = codec.encode_many([NewChunk(louder * k, louder * v, start)])
                if isinstance(made, CodecError):
                    assert made.reason == "size"
                else:
                    kept += 1
                    assert len(made) <= codec.max_blob_bytes(tokens)
    assert kept >= 6


def test_an_artifact_of_one_ratio_keeps_the_columns_of_sinks(codec_of: Codecs) -> None:
    """What is resident on a GPU. Its blobs are those of the whole."""
    artifact = codec_of.artifact()
    kept = at_ratio(artifact, 8.0)
    assert kept.ratios() == (8.0,)
    for section in kept.sections.values():
        plan = section.plans[8.0]
        assert plan.rank < section.basis.shape[1] == plan.total_rank
    k, v = chunk_with_sinks(100, 0, [20, 50])
    whole, own = (
        open_codec("kvtc2", torch.bfloat16, artifact=a, ratio=8.0) for a in (artifact, kept)
    )
    assert own.encode(k, v, 0) == whole.encode(k, v, 0)
