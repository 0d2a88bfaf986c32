"""The fast codec against the reference: blobs, errors, batches, precision."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kvtc_vllm.codec.cpu as cpu
from kvtc_vllm.codec.artifact import KINDS, RankArtifact
from kvtc_vllm.codec.base import ChunkCodec, DecodedChunk, NewChunk, StoredChunk, read_section
from kvtc_vllm.codec.container import CHECKSUM_BYTES, HEADER_BYTES, checksum, parse
from kvtc_vllm.codec.cpu.codec import CpuCodec, CpuKvtc2Codec, CpuKvtcCodec
from kvtc_vllm.codec.cpu.products import has_int8_products
from kvtc_vllm.codec.cpu.tiles import TILE_TOKENS
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.payload import BitPlan
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.section_coder import SectionCoder
from kvtc_vllm.codec.v2.codec import Kvtc2Codec
from kvtc_vllm.codec.v2.plan import StepPlan
from tests.codec.synthetic import SyntheticModel, rope_table
from tests.codec.v2.made_up import step_artifact
from tests.golden.formula import GOLDEN

MODEL = SyntheticModel(
    num_layers=6, num_kv_heads=2, head_size=16, head_size_v=24, layer_groups=((0, 2), (2, 6))
)
RATIOS = (4.0, 16.0)
FOLDER = Path(__file__).parents[2] / "golden"
INT8 = pytest.param(
    True,
    id="int8",
    marks=pytest.mark.skipif(not has_int8_products(), reason="this CPU saturates int8 products"),
)
PRECISIONS = [pytest.param(False, id="float32"), INT8]


@pytest.fixture(scope="module", params=["kvtc", "kvtc2 paired"])
def artifact(request: pytest.FixtureRequest) -> RankArtifact:
    if request.param == "kvtc":
        return MODEL.artifact(RATIOS)
    return step_artifact(MODEL, RATIOS, fit_rows=1024, paired=True)


def with_plans(
    artifact: RankArtifact, change: Callable[[SectionCoder], SectionCoder]
) -> RankArtifact:
    sections = {
        key: replace(s, plans={r: change(p) for r, p in s.plans.items()})
        for key, s in artifact.sections.items()
    }
    return replace(artifact, sections=sections)


def with_error(artifact: RankArtifact, error: float) -> RankArtifact:
    """The artifact with another expected error, by which precision is chosen."""

    def changed(plan: SectionCoder) -> SectionCoder:
        if isinstance(plan, StepPlan):
            return replace(plan, expected_error=error)
        assert isinstance(plan, BitPlan)
        return replace(plan, predicted_error=error)

    return with_plans(artifact, changed)


def of_nothing(plan: SectionCoder) -> SectionCoder:
    """The plan without coefficients."""
    if isinstance(plan, StepPlan):
        return replace(plan, classes=plan.classes[:0])
    assert isinstance(plan, BitPlan)
    return replace(plan, groups=())


def pair(
    artifact: RankArtifact, ratio: float, dtype: torch.dtype, int8: bool | None
) -> tuple[TransformCodec, CpuCodec]:
    if artifact.codec == "kvtc":
        return KvtcCodec(artifact, ratio, dtype), CpuKvtcCodec(artifact, ratio, dtype, int8=int8)
    return Kvtc2Codec(artifact, ratio, dtype), CpuKvtc2Codec(artifact, ratio, dtype, int8=int8)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Squared difference relative to the wanted's squares."""
    difference = (found.float() - wanted.float()).double().square().sum()
    return float(difference / wanted.double().square().sum())


def ropes(artifact: RankArtifact) -> dict[str, RankArtifact]:
    """Other rotations of the same keys; rows are then other ones, which codecs do not know."""
    partial = Rope(rope_table(8), neox=True)
    swapped = Rope(rope_table(16), neox=False)
    scaled = Rope(rope_table(16).float() * 1.2)
    mixed = (0, None, 1, 1, 2, None)
    return {
        "one": artifact,
        "none": replace(artifact, ropes=(), layer_rope=(None,) * 6),
        "mixed": replace(artifact, ropes=(partial, swapped, scaled), layer_rope=mixed),
    }


@pytest.mark.parametrize("int8", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("which", ["one", "none", "mixed"])
def test_each_reads_what_the_other_writes(artifact, which, dtype, int8):
    """Coefficients differ by rounding, which moves a code now and then, so errors are compared."""
    artifact = ropes(artifact)[which]
    for start, tokens in ((0, 1), (0, 3), (2, 40), (500, 128)):
        k, v = MODEL.chunk(tokens, start, 3, dtype)
        codecs = pair(artifact, 16.0, dtype, int8)
        blobs = [codec.encode(k, v, start) for codec in codecs]
        reference = codecs[0].decode(blobs[0], start, tokens)
        for codec in codecs:
            for blob in blobs:
                decoded = codec.decode(blob, start, tokens)
                for found, wanted in ((decoded.k, reference.k), (decoded.v, reference.v)):
                    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
                    assert distance(found, wanted) < 2e-2
                for found, wanted, original in (
                    (decoded.k, reference.k, k),
                    (decoded.v, reference.v, v),
                ):
                    limit = 1.01 * distance(wanted, original) + 1e-5
                    assert distance(found, original) < limit


def test_products_of_float32_give_the_reference_s_codes(artifact):
    """All but those at a rounding boundary, which another order of summation may cross."""
    reference, fast = pair(artifact, 4.0, torch.bfloat16, False)
    k, v = MODEL.chunk(128, 64, 3)
    blobs = [codec.encode(k, v, 64) for codec in (reference, fast)]
    different = total = 0
    for a, b in zip(*(parse(blob).sections for blob in blobs), strict=True):
        x, y = (read_section(s, memoryview(t)) for s, t in zip((a, b), blobs, strict=True))
        different += sum(p != q for p, q in zip(x, y, strict=True))
        total += len(x)
    assert total > 10_000
    assert different < total / 500
    decoded = [codec.decode(blobs[0]) for codec in (reference, fast)]
    assert distance(decoded[1].k, decoded[0].k) < 1e-6


@pytest.mark.skipif(not has_int8_products(), reason="this CPU saturates int8 products")
@pytest.mark.parametrize(
    ("expected_error", "limit", "words"),
    [(0.05, 6e-4, "int8"), (0.005, 2e-4, "int8 beside leading columns"), (5e-4, 1e-6, "float32")],
)
def test_precision_is_what_the_plan_s_error_hides(artifact, expected_error, limit, words):
    """limit: of what rounding adds to the relative squared error of a decoded chunk."""
    reference, fast = pair(with_error(artifact, expected_error), 4.0, torch.float32, True)
    assert fast.arithmetic.endswith(f" of {words}")
    k, v = MODEL.chunk(256, 64, 3, torch.float32)
    blob = reference.encode(k, v, 64)
    wanted, found = reference.decode(blob), fast.decode(blob)
    assert distance(found.k, wanted.k) < limit
    assert distance(found.v, wanted.v) < limit


@pytest.mark.parametrize("int8", PRECISIONS)
def test_weights_and_scales_as_the_reference(artifact, int8):
    chance = torch.Generator().manual_seed(0)
    sections = {
        key: replace(s, weights=torch.rand(len(s.mean), generator=chance) + 0.5)
        for key, s in artifact.sections.items()
    }
    scales = {kind: torch.linspace(0.5, 2.0, 6) for kind in ("k", "v")}
    weighted = replace(artifact, sections=sections, scales=scales)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        reference, fast = pair(weighted, 4.0, dtype, int8)
        k, v = MODEL.chunk(64, 0, 3, dtype)
        wanted = reference.decode(reference.encode(k, v, 0))
        found = fast.decode(fast.encode(k, v, 0))
        assert torch.equal(found.k[:4].float(), k[:4].float())
        assert distance(found.k, wanted.k) < 1e-2
        assert distance(found.v, wanted.v) < 1e-2


@pytest.mark.parametrize("int8", PRECISIONS)
def test_small_elements_of_high_weight_survive_rounding(artifact, int8):
    """What rows are rounded by is their largest element: weighted, the small ones are not lost."""
    sections = {}
    for key, section in with_error(artifact, 0.02).sections.items():
        # Elements a thousand times smaller, weighted a thousand times more: the same coefficients.
        scale = torch.ones(len(section.mean))
        scale[::2] = 1e-3
        sections[key] = replace(section, mean=section.mean * scale, weights=1 / scale)
    weighted = replace(artifact, sections=sections, ropes=(), layer_rope=(None,) * 6)
    reference, fast = pair(weighted, 16.0, torch.float32, int8)
    rows = {}
    for kind in KINDS:
        parts = []
        for group, (first, end) in enumerate(MODEL.geometry.layer_groups):
            name = "kv" if (group, "kv") in sections else kind
            own = MODEL.geometry.row_parts(group, name)[kind]
            part = (MODEL.rows(64, group, name, 5) / sections[group, name].weights)[:, own]
            parts.append(part.reshape(64, end - first, 2, -1))
        rows[kind] = torch.cat(parts, dim=1)
    wanted = reference.decode(reference.encode(rows["k"], rows["v"], 64))
    found = fast.decode(fast.encode(rows["k"], rows["v"], 64))
    for kind, mine, other in (("k", found.k, wanted.k), ("v", found.v, wanted.v)):
        small = [x.flatten(1)[:, ::2] for x in (mine, other, rows[kind])]
        assert distance(small[0], small[2]) < 1.05 * distance(small[1], small[2])
        assert distance(small[0], small[1]) < 0.01


@pytest.mark.parametrize("int8", PRECISIONS)
def test_a_plan_of_nothing_gives_the_mean(artifact, int8):
    reference, fast = pair(with_plans(artifact, of_nothing), 4.0, torch.float32, int8)
    k, v = MODEL.chunk(8, 16, 3, torch.float32)
    blob = fast.encode(k, v, 16)
    assert blob == reference.encode(k, v, 16)
    torch.testing.assert_close(fast.decode(blob).k, reference.decode(blob).k)


def test_rows_of_hardly_anything_survive(artifact):
    """Steps of 0, and of less than the least float32, of a row that is its mean."""
    tiny = replace(
        artifact,
        sections={
            k: replace(s, mean=torch.zeros_like(s.mean)) for k, s in artifact.sections.items()
        },
    )
    for artifact_, size in ((artifact, 0.0), (tiny, 0.0), (tiny, 1e-38), (tiny, 1e-20)):
        _, fast = pair(artifact_, 16.0, torch.float32, None)
        k, v = (size * x for x in MODEL.chunk(8, 16, 3, torch.float32))
        decoded = fast.decode(fast.encode(k, v, 16))
        assert decoded.k.isfinite().all()


def chunks_of(sizes: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> list[NewChunk]:
    made, start = [], 0
    for i, tokens in enumerate(sizes):
        made.append(NewChunk(*MODEL.chunk(tokens, start, i, dtype), start, b"%d" % i))
        start += tokens
    return made


@pytest.mark.parametrize("int8", PRECISIONS)
def test_batches_are_their_chunks(artifact, int8):
    _, fast = pair(artifact, 16.0, torch.bfloat16, int8)
    new = chunks_of([3, 1, 16, 16, TILE_TOKENS, 7, TILE_TOKENS - 7, 1, TILE_TOKENS + 1])
    blobs = fast.encode_many(new)
    stored = []
    for blob, chunk in zip(blobs, new, strict=True):
        assert isinstance(blob, bytes)
        alone = fast.encode(chunk.k, chunk.v, chunk.start, chunk.key)
        # Products of float32 may be summed in another order in a larger batch.
        assert blob == alone if int8 else abs(len(blob) - len(alone)) < 64
        stored.append(StoredChunk(blob, chunk.start, chunk.k.shape[0], chunk.key))
    for chunk, part in zip(stored, fast.decode_many(stored), strict=True):
        assert isinstance(part, DecodedChunk)
        alone = fast.decode(chunk.blob, chunk.start, chunk.tokens, chunk.key)
        assert part.start == chunk.start
        assert distance(part.k, alone.k) < 1e-5
        assert distance(part.v, alone.v) < 1e-5


def test_a_bad_chunk_costs_no_other(artifact):
    reference, fast = pair(artifact, 16.0, torch.bfloat16, has_int8_products())
    new = chunks_of([16] * 5)
    new[1].k[3, 2, 1, 0] = float("nan")
    new[2].v.fill_(3e38)
    far = replace(new[3], start=MODEL.max_positions - 8)
    new[3] = far
    for codec in (reference, fast):
        results = codec.encode_many(new)
        reasons = [r.reason if isinstance(r, CodecError) else None for r in results]
        assert reasons == [None, "non_finite", "range", "position", None]
    good = fast.encode_many(chunks_of([16] * 4))
    stored = [StoredChunk(blob, key=b"%d" % i) for i, blob in enumerate(good)]
    stored[1] = replace(stored[1], key=b"another")
    stored[2] = replace(stored[2], blob=stored[2].blob[:-1])
    for codec in (reference, fast):
        results = codec.decode_many(stored)
        reasons = [r.reason if isinstance(r, ContainerError) else None for r in results]
        assert reasons == [None, "fingerprint", "checksum", None]
    assert fast.encode_many([]) == fast.decode_many([]) == []


def test_ratios_of_one_batch_may_differ(artifact):
    codecs = [pair(artifact, ratio, torch.bfloat16, None)[1] for ratio in RATIOS]
    new = chunks_of([16, 16, 16, 16])
    blobs = [codecs[i % 2].encode(c.k, c.v, c.start) for i, c in enumerate(new)]
    for codec in codecs:
        for chunk, part in zip(
            new, codec.decode_many([StoredChunk(b) for b in blobs]), strict=True
        ):
            assert isinstance(part, DecodedChunk)
            assert distance(part.v, chunk.v) < 0.2


def reason(codec: ChunkCodec, blob: bytes) -> str:
    try:
        codec.decode(blob)
    except ContainerError as error:
        return error.reason
    return "decodes"


def test_damage_is_refused_for_the_reference_s_reason(artifact):
    """Checksums are made good again, so that what lies behind them must find the damage."""
    reference, fast = pair(artifact, 4.0, torch.bfloat16, has_int8_products())
    blob = fast.encode(*MODEL.chunk(12, 2, 3), 2)
    chance = random.Random(11)
    reasons = set()
    for _ in range(1000):
        damaged = bytearray(blob[:-CHECKSUM_BYTES])
        for _ in range(chance.choice((1, 1, 2, 8))):
            tables = HEADER_BYTES + 200
            place = chance.randrange(chance.choice((tables, len(damaged))))
            damaged[place] = chance.randrange(256)
        sealed = bytes(damaged) + checksum(damaged)
        assert reason(fast, sealed) == reason(reference, sealed)
        reasons.add(reason(fast, sealed))
    assert reasons >= {"decodes", "bounds", "entropy", "geometry", "fingerprint", "version"}


@pytest.mark.parametrize("golden", [pytest.param(g, id=g.name) for g in GOLDEN])
def test_golden_blobs(golden):
    reference = golden.make_codec()
    if not isinstance(reference, TransformCodec):
        pytest.skip("raw has no fast way")
    make = CpuKvtcCodec if isinstance(reference, KvtcCodec) else CpuKvtc2Codec
    fast = make(
        reference.artifact, reference.ratio, reference.dtype, reference.identity, int8=False
    )
    blob = (FOLDER / f"{golden.name}.kvtc").read_bytes()
    wanted, found = reference.decode(blob), fast.decode(blob)
    limit = 1e-9 if reference.dtype.itemsize > 1 else 1e-3
    assert distance(found.k, wanted.k) < limit
    assert distance(found.v, wanted.v) < limit


def test_small_matrices_stay_float32_unless_asked(artifact):
    """They would gain nothing; 64 features by some hundred columns are small."""
    for int8, words in ((None, "float32"), (True, "int8")):
        _, fast = pair(artifact, 16.0, torch.bfloat16, int8)
        assert fast.arithmetic.endswith(f" of {words}")


def test_what_opens_codecs_takes_it_where_it_runs(artifact, monkeypatch, caplog):
    def opened(**changes: object) -> type[ChunkCodec]:
        return type(
            open_codec(artifact.codec, torch.bfloat16, artifact=artifact, ratio=16.0, **changes)
        )

    reference, fast = (type(codec) for codec in pair(artifact, 16.0, torch.bfloat16, None))
    with caplog.at_level("INFO"):
        assert opened() is fast
    assert f"{artifact.codec} 16x on the CPU: compiled loops" in caplog.text
    assert opened(fast=False) is reference
    assert opened(device="meta") is reference
    with pytest.raises(ValueError, match="device is meta"):
        fast(artifact, 16.0, torch.bfloat16, device="meta")
    monkeypatch.setattr(cpu, "find_spec", lambda name: None)
    assert opened() is reference


def test_input_is_left_alone(artifact):
    _, fast = pair(artifact, 4.0, torch.bfloat16, has_int8_products())
    k, v = MODEL.chunk(64)
    before = [hashlib.sha256(x.view(torch.uint8).numpy().tobytes()).digest() for x in (k, v)]
    fast.encode(k, v, 0)
    after = [hashlib.sha256(x.view(torch.uint8).numpy().tobytes()).digest() for x in (k, v)]
    assert after == before


def test_everything_answers_for_its_attributes():
    """vLLM's CPU platform asks everything in every module for them when it starts."""
    for module in list(sys.modules.values()):
        for value in list(getattr(module, "__dict__", {}).values()):
            if hasattr(value, "__dict__"):
                vars(value).get("kernel")
