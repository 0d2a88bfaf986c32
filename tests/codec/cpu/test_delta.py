"""Blobs of codec 2 as differences from others: the very bytes come back, or a miss."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch

from kvtc_vllm.codec.container import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    SectionKind,
    checksum,
    parse,
)
from kvtc_vllm.codec.cpu.delta import DeltaCoder
from kvtc_vllm.codec.cpu.level_coder import (
    NO_SOURCE,
    get_levels,
    new_model,
    put_levels,
    room_of_column,
)
from kvtc_vllm.codec.cpu.packed_levels import pack_levels, unpack_levels
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.frame import SECTION_NAME, TransformCodec
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.codec.v2.codes import MAX_LEVEL, decode_codes, encode_codes
from kvtc_vllm.codec.v2.plan import step_plan
from tests.codec.synthetic import SyntheticModel
from tests.codec.v2.made_up import step_artifact

MODEL = SyntheticModel(
    num_layers=3, num_kv_heads=2, head_size=16, head_size_v=24, layer_groups=((0, 2), (2, 3))
)
RULE = SinkRule(layers=(1, 2), threshold=-1.0, max_share=0.05)
TOKENS = 128
PAIRED = pytest.mark.parametrize("paired", [False, True], ids=["apart", "paired"])


@cache
def codec_of(
    rule: SinkRule | None = RULE, ratio: float = 8.0, paired: bool = False
) -> TransformCodec:
    artifact = step_artifact(MODEL, (4.0, 8.0), rule, paired=paired)
    return open_codec("kvtc2", torch.bfloat16, artifact=artifact, ratio=ratio)


def coder_of(codec: TransformCodec) -> DeltaCoder:
    return DeltaCoder(codec.artifact, ENTROPY)


@cache
def passage(noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """K before RoPE and V of the same 256 tokens, a little different with each seed."""
    k, v = MODEL.chunk(2 * TOKENS, 1000, seed=3)
    marked = [7, 150]
    v[marked, 1:] *= 2.0**-9
    generator = torch.Generator().manual_seed(seed)
    k, v = (x + noise * x * torch.randn(x.shape, generator=generator) for x in (k, v))
    return k.to(torch.bfloat16), v.to(torch.bfloat16)


def blob_of(codec: TransformCodec, token: int, noise: float = 0.0, seed: int = 0) -> bytes:
    """A chunk of the passage from a token on, where it always is: without a shift of positions."""
    k, v = passage(noise, seed)
    own = slice(token, token + TOKENS)
    return codec.encode(k[own], v[own], 1000 + token, b"key %d %d" % (token, seed))


@pytest.mark.parametrize("rule", [RULE, None], ids=["marks", "no marks"])
@pytest.mark.parametrize("ratio", [4.0, 8.0])
@PAIRED
def test_what_is_alike_takes_less_and_comes_back(
    rule: SinkRule | None, ratio: float, paired: bool
) -> None:
    codec = codec_of(rule, ratio, paired)
    coder = coder_of(codec)
    sources = [blob_of(codec, 0), blob_of(codec, TOKENS)]
    blob = blob_of(codec, 40, noise=0.02, seed=1)
    runs = [(0, 0, 40, 88), (88, 1, 0, 40)]
    both = coder.encode(blob, sources, runs, len(blob))
    one = coder.encode(blob, sources[:1], runs[:1], len(blob))
    assert both is not None
    assert one is not None
    assert len(both) < 0.6 * len(blob)
    assert len(both) < len(one) < len(blob)
    assert coder.decode(both, sources) == blob
    assert coder.decode(one, sources[:1]) == blob
    # The source has the very same tokens: hardly anything is left.
    same = coder.encode(sources[0], sources[:1], [(0, 0, 0, TOKENS)], len(blob))
    assert same is not None
    assert len(same) < 0.25 * len(blob)


@PAIRED
def test_sinks_at_the_beginning_have_no_levels(paired: bool) -> None:
    codec = codec_of(paired=paired)
    k, v = passage(0.0)
    first = codec.encode(k[:TOKENS], v[:TOKENS], 0, b"first")
    later = codec.encode(k[:TOKENS], v[:TOKENS], 64, b"later")
    coder = coder_of(codec)
    for blob, source in ((first, later), (later, first)):
        made = coder.encode(blob, [source], [(0, 0, 0, TOKENS)], 2 * len(blob))
        assert made is not None
        assert coder.decode(made, [source]) == blob


def test_levels_of_another_plan_are_no_source() -> None:
    fine, coarse = blob_of(codec_of(ratio=4.0), 0), blob_of(codec_of(), 0)
    run = [(0, 0, 0, TOKENS)]
    coder = coder_of(codec_of())
    assert coder.encode(coarse, [fine], run, len(coarse)) is None
    assert coder.encode(fine, [coarse], run, len(fine)) is None
    assert coder.encode(fine, [fine], run, len(fine)) is not None  # any ratio of the artifact


def test_no_more_than_may_be_taken() -> None:
    codec = codec_of()
    coder = coder_of(codec)
    source, blob = blob_of(codec, 0), blob_of(codec, 0, noise=0.02, seed=1)
    made = coder.encode(blob, [source], [(0, 0, 0, TOKENS)], len(blob))
    assert made is not None
    runs = [(0, 0, 0, TOKENS)]
    assert coder.encode(blob, [source], runs, len(made)) == made
    for most in (len(made) - 1, len(made) // 2, 100, 0):
        assert coder.encode(blob, [source], runs, most) is None


@pytest.mark.parametrize("run", [(0, 0, 1, TOKENS), (1, 0, 0, TOKENS), (0, 0, 60_000, 8)], ids=str)
def test_runs_beyond_a_blob_give_nothing(run: tuple[int, int, int, int]) -> None:
    blob = blob_of(codec_of(), 0)
    assert coder_of(codec_of()).encode(blob, [blob], [run], len(blob)) is None


def test_blobs_of_others_give_nothing() -> None:
    codec, other = codec_of(), codec_of(None)
    blob, foreign = blob_of(codec, 0), blob_of(other, 0)
    run = [(0, 0, 0, TOKENS)]
    coder = coder_of(codec)
    assert coder.encode(foreign, [foreign], run, len(foreign)) is None
    assert coder.encode(blob, [foreign], run, len(blob)) is None
    assert coder.encode(blob[:-1], [blob], run, len(blob)) is None
    assert coder.encode(blob, [blob[:-1]], run, len(blob)) is None


@PAIRED
def test_sections_of_another_artifact_give_nothing(paired: bool) -> None:
    """Behind a good checksum and the right fingerprint, as no codec writes them."""
    codec = codec_of(paired=paired)
    coder = coder_of(codec)
    blob = blob_of(codec, 0)
    run = [(0, 0, 0, TOKENS)]
    kind = SectionKind.CODED_K if paired else SectionKind.CODED_PAIR
    first = next(n for n, s in enumerate(parse(blob).sections) if s.kind in SECTION_NAME)
    for at, value in ((0, kind), (2, 9)):
        altered = bytearray(blob[:-CHECKSUM_BYTES])
        altered[HEADER_BYTES + 16 * first + at] = value
        sealed = bytes(altered) + checksum(bytes(altered))
        assert parse(sealed).sections[first] != parse(blob).sections[first]
        assert coder.encode(sealed, [blob], run, 2 * len(blob)) is None
        assert coder.encode(blob, [sealed], run, 2 * len(blob)) is None


def test_other_sources_and_altered_bytes_are_refused() -> None:
    """Every truncation and every altered byte of a difference, and sources that changed."""
    codec = codec_of()
    coder = coder_of(codec)
    source, blob = blob_of(codec, 0), blob_of(codec, 0, noise=0.02, seed=1)
    made = coder.encode(blob, [source], [(0, 0, 0, TOKENS)], len(blob))
    assert made is not None
    altered = bytearray(source)
    altered[len(source) // 2] ^= 1
    wrong = [[blob], [], [source, source], [bytes(altered)]]
    for sources in wrong:
        with pytest.raises(ContainerError):
            coder.decode(made, sources)
    rng = random.Random(0)
    places = [*range(300), *(rng.randrange(len(made)) for _ in range(200))]
    for place in places:
        bad = bytearray(made)
        bad[place] ^= 1 << rng.randrange(8)
        with pytest.raises(ContainerError):
            coder.decode(bytes(bad), [source])
    for length in [*range(0, 200), *range(200, len(made), 97)]:
        with pytest.raises(ContainerError):
            coder.decode(made[:length], [source])


def test_payloads_are_the_reference_s() -> None:
    """Levels of every size, in every width, with escapes and wide ones."""
    generator = torch.Generator().manual_seed(0)
    artifacts = codec_of().artifact, codec_of(paired=True).artifact
    for section in (s for artifact in artifacts for s in artifact.sections.values()):
        plan = step_plan(section, 8.0)
        sizes = torch.randn((plan.rank, 37), generator=generator) * torch.logspace(-1, 4, 37)
        levels = sizes.int().clamp(-MAX_LEVEL, MAX_LEVEL)
        codes = torch.where(levels > 0, 2 * levels - 1, -2 * levels)
        payload = b"".join(pack_levels(levels.numpy(), plan))
        assert payload == b"".join(encode_codes(codes, plan.packed))
        assert np.array_equal(unpack_levels(bytearray(payload), plan, 37), levels.numpy())
        for bad in (payload[:-1], payload + b"\0", payload[:1]):
            with pytest.raises(ContainerError):
                decode_codes(bytearray(bad), plan.packed, plan.rank, 37, torch.device("cpu"))
            with pytest.raises(ContainerError):
                unpack_levels(bytearray(bad), plan, 37)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3000.0])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids="{:g} with a source".format)
def test_levels_come_back(spread: float, share: float) -> None:
    rng = np.random.default_rng(0)
    shape = (60, 50)

    def levels() -> np.ndarray:
        made = np.rint(rng.laplace(0, spread, shape))
        return np.clip(made, -MAX_LEVEL, MAX_LEVEL).astype(np.int32)

    own, sources = levels(), levels()
    own[0, :2] = MAX_LEVEL, -MAX_LEVEL
    sources[0, :2] = -MAX_LEVEL, MAX_LEVEL
    sources[:, rng.random(shape[1]) >= share] = NO_SOURCE
    classes = np.arange(shape[0]) // 20
    out = np.zeros(40 * own.size + room_of_column(shape[1]), np.uint8)
    taken = put_levels(own, sources, classes, new_model(3), out)
    assert taken > 0
    back = np.zeros_like(own)
    assert get_levels(out[:taken], sources, classes, new_model(3), back) > 0
    assert np.array_equal(back, own)
    exact = out[: taken + room_of_column(shape[1])]
    assert put_levels(own, sources, classes, new_model(3), exact) == taken
    assert put_levels(own, sources, classes, new_model(3), exact[: len(exact) // 2]) == -1


def test_any_bytes_end() -> None:
    rng = np.random.default_rng(1)
    sources = np.full((30, 40), NO_SOURCE, np.int32)
    classes = np.zeros(30, np.int64)
    for size in (0, 1, 4, 100, 5000):
        data = rng.integers(0, 256, size).astype(np.uint8)
        back = np.zeros_like(sources)
        get_levels(data, sources, classes, new_model(1), back)
        assert np.abs(back).max() <= MAX_LEVEL
