"""Blobs that are halved: valid blobs of a lower ratio, or an error and never anything else."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from kvtc_vllm.codec.artifact import RankArtifact, SectionKey, SectionName
from kvtc_vllm.codec.base import ChunkCodec, read_section
from kvtc_vllm.codec.container import CHECKSUM_BYTES, SectionKind, checksum, parse, ratio_of
from kvtc_vllm.codec.cpu.requantise import Requantiser
from kvtc_vllm.codec.errors import ArtifactError, CodecError, ContainerError
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.codec.v2.codec import ENTROPY, Kvtc2Codec
from kvtc_vllm.codec.v2.codes import decode_codes
from kvtc_vllm.codec.v2.plan import step_plan
from tests.codec.synthetic import SyntheticModel
from tests.codec.v2.made_up import step_artifact

MODEL = SyntheticModel(
    num_layers=3, num_kv_heads=2, head_size=16, head_size_v=24, layer_groups=((0, 2), (2, 3))
)
RULE = SinkRule(layers=(1, 2), threshold=-1.0, max_share=0.05)
TOKENS, START, KEY = 128, 1000, b"a chunk"
PAIRED = pytest.mark.parametrize("paired", [False, True], ids=["apart", "paired"])


@cache
def codec_of(
    rule: SinkRule | None = RULE, ratio: float = 6.0, fast: bool = True, paired: bool = False
) -> TransformCodec:
    artifact = step_artifact(MODEL, (6.0,), rule, halvings=2, paired=paired)
    return open_codec("kvtc2", torch.bfloat16, artifact=artifact, ratio=ratio, fast=fast)


@cache
def halver_of(rule: SinkRule | None = RULE, paired: bool = False) -> Requantiser:
    codec = codec_of(rule, paired=paired)
    assert isinstance(codec, Kvtc2Codec)
    return Requantiser(codec, ENTROPY)


@cache
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """With two tokens that the rule marks."""
    k, v = MODEL.chunk(TOKENS, START, seed=3)
    v[[7, 90], 1:] *= 2.0**-9
    return k.bfloat16(), v.bfloat16()


def error(codec: ChunkCodec, blob: bytes) -> float:
    k, v = rows()
    chunk = codec.decode(blob, START, TOKENS, KEY)
    return sum(
        float((a.float() - b.float()).square().sum()) for a, b in ((k, chunk.k), (v, chunk.v))
    )


@pytest.mark.parametrize("rule", [RULE, None], ids=["marks", "no marks"])
@PAIRED
def test_a_halved_blob_is_as_good_as_one_stored_at_its_ratio(
    rule: SinkRule | None, paired: bool
) -> None:
    halver = halver_of(rule, paired)
    assert halver.most_times == 2
    blob = codec_of(rule, paired=paired).encode(*rows(), START, KEY)
    assert halver.times_halved(blob) == 0
    for times, ratio in enumerate(halver.ratios[1:], 1):
        smaller = halver.halve(blob, KEY)
        assert ratio_of(smaller) == parse(smaller).header.ratio == ratio
        assert halver.times_halved(smaller) == times
        assert len(smaller) < 0.8 * len(blob)
        reference = codec_of(rule, fast=False, paired=paired)
        direct = codec_of(rule, ratio, False, paired).encode(*rows(), START, KEY)
        assert abs(len(smaller) / len(direct) - 1) < 0.01
        for own in (error(codec_of(rule, paired=paired), smaller), error(reference, smaller)):
            assert own < 1.02 * error(reference, direct)
        blob = smaller
    with pytest.raises(CodecError, match="is not halved") as last:
        halver.halve(blob, KEY)
    assert last.value.reason == "ratio"


def test_sinks_stay_exact_and_a_chunk_of_nothing_else_stays_whole() -> None:
    k, v = rows()
    codec, halver = codec_of(), halver_of()
    first = halver.halve(codec.encode(k, v, 0, KEY), KEY)
    chunk = codec.decode(first, 0, TOKENS, KEY)
    sinks = codec.artifact.sink_tokens
    assert torch.equal(chunk.k[:sinks], k[:sinks])
    assert torch.equal(chunk.v[:sinks], v[:sinks])
    only = codec.encode(k[:sinks], v[:sinks], 0, KEY)
    assert len(halver.halve(only, KEY)) == len(only)


NUMBERS: dict[int, tuple[SectionName, bool]] = {
    0: ("k", False),
    1: ("v", False),
    6: ("k", True),
    7: ("v", True),
    8: ("kv", False),
    9: ("kv", True),
}
"""Kinds of sections in FORMAT.md: what they hold, and whether beyond the rank of the others."""


def levels_of(blob: bytes, artifact: RankArtifact) -> dict[SectionKey, list[Any]]:
    """Of every section, and of marked tokens beyond, by the reference: [r, N] and [r', M]."""
    info = parse(blob)
    tokens = info.header.tokens - info.header.sinks
    marked = 0
    found: dict[SectionKey, list[Any]] = {}
    for section in info.sections:
        payload = read_section(section, memoryview(blob))
        if section.kind == SectionKind.MARKS:
            marked = int(np.unpackbits(np.frombuffer(payload, np.uint8)).sum())
        if section.kind not in NUMBERS:
            continue
        name, is_beyond = NUMBERS[section.kind]
        plan = step_plan(artifact.sections[section.group, name], info.header.ratio)
        count = tokens
        columns = plan.rank
        if is_beyond:
            count, columns = marked, 0 if plan.beyond is None else plan.beyond.rank
            plan = plan if plan.beyond is None else plan.beyond
        parts = plan.packed if columns else ()
        codes = decode_codes(payload, parts, columns, count, torch.device("cpu")).numpy()
        levels = np.where(codes % 2, (codes + 1) // 2, -(codes // 2))
        found.setdefault((section.group, name), []).append(levels)
    return found


@PAIRED
def test_levels_are_what_the_specification_says(paired: bool) -> None:
    """FORMAT.md, section 9, nested plans."""
    codec, halver = codec_of(paired=paired), halver_of(paired=paired)
    blob = codec.encode(*rows(), 0, KEY)
    smaller = halver.halve(blob, KEY)
    fine, coarse = (levels_of(each, codec.artifact) for each in (blob, smaller))
    marks = [7 - codec.artifact.sink_tokens, 90 - codec.artifact.sink_tokens]
    assert set(fine) == set(codec.artifact.section_keys())
    for key, (main, beyond) in fine.items():
        half, half_beyond = coarse[key]
        rank, further = len(half), len(half_beyond)
        assert (half == np.fix(main[:rank] / 2)).all()
        of_sinks = np.concatenate((main[:, marks], beyond))[rank : rank + further]
        assert (half_beyond == np.fix(of_sinks / 2)).all()
        assert half.any()
    assert any(beyond.any() for _, beyond in coarse.values())
    for old, new in zip(parse(blob).sections, parse(smaller).sections, strict=True):
        if old.kind in (SectionKind.SINKS, SectionKind.MARKS):
            assert read_section(old, memoryview(blob)) == read_section(new, memoryview(smaller))


def test_it_keeps_its_name() -> None:
    codec, halver = codec_of(), halver_of()
    blob = codec.encode(*rows(), START, KEY)
    smaller = halver.halve(blob, KEY)
    with pytest.raises(ContainerError, match="under another name"):
        codec.decode(smaller, START, TOKENS, b"another")
    with pytest.raises(ContainerError, match="under another name"):
        halver.halve(blob, b"another")


@pytest.mark.parametrize("others", [(None, False), (RULE, True)], ids=["no marks", "paired"])
def test_another_artifacts_blob_is_refused(others: tuple[SinkRule | None, bool]) -> None:
    blob = codec_of(others[0], paired=others[1]).encode(*rows(), START, KEY)
    with pytest.raises(ContainerError):
        halver_of(RULE).halve(blob, KEY)


def test_what_is_altered_is_refused() -> None:
    blob = codec_of().encode(*rows(), START, KEY)
    halver = halver_of()
    draw = random.Random(0)
    for _ in range(100):
        altered = bytearray(blob)
        altered[draw.randrange(len(blob))] ^= 1 << draw.randrange(8)
        with pytest.raises(ContainerError):
            halver.halve(bytes(altered), KEY)
    for end in (*range(0, 200, 7), *range(200, len(blob), 997)):
        with pytest.raises(ContainerError):
            halver.halve(blob[:end], KEY)


@PAIRED
def test_a_forged_checksum_gives_an_error_or_a_valid_blob(paired: bool) -> None:
    halver, codec = halver_of(paired=paired), codec_of(paired=paired)
    blob = codec.encode(*rows(), START, KEY)
    draw = random.Random(1)
    refused = 0
    for _ in range(300):
        altered = bytearray(blob[:-CHECKSUM_BYTES])
        for _ in range(draw.randrange(1, 4)):
            altered[draw.randrange(len(altered))] = draw.randrange(256)
        try:
            smaller = halver.halve(bytes(altered) + checksum(bytes(altered)), KEY)
        except CodecError:
            refused += 1
            continue
        codec.decode(smaller, START, TOKENS, KEY)
    assert 0 < refused < 300


def test_the_floor_and_what_is_not_nested() -> None:
    codec = codec_of()
    assert isinstance(codec, Kvtc2Codec)
    _, second, third = halver_of().ratios
    assert Requantiser(codec, ENTROPY, second).ratios == (6.0, second)
    assert Requantiser(codec, ENTROPY, (second + third) / 2).most_times == 1
    with pytest.raises(
        ArtifactError, match=f"degrade_floor=6.1: .* halved to ratio {second:g}; give"
    ):
        Requantiser(codec, ENTROPY, 6.1)
    plain = step_artifact(MODEL, (4.0, 8.0), RULE)
    other = open_codec("kvtc2", torch.bfloat16, artifact=plain, ratio=4.0)
    assert isinstance(other, Kvtc2Codec)
    with pytest.raises(ArtifactError, match=r"nested in that of ratio 4; .*halvings"):
        Requantiser(other, ENTROPY)
