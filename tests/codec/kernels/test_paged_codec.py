"""Batches through the paged cache against the CPU codec, chunk by chunk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvtc_vllm.codec.base import read_section
from kvtc_vllm.codec.container import NewSection, SectionKind, build, parse
from kvtc_vllm.codec.entropy import DEFLATE, EncodedSection
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.registry import CODECS
from kvtc_vllm.codec.streams import SideStream
from kvtc_vllm.codec.transform import to_cache
from tests.codec.kernels.codecs import ALL, REFERENCE, artifact_of, mark
from tests.codec.kernels.devices import DEVICES
from tests.codec.kernels.paged_caches import paged_cache, read_slots
from tests.codec.kernels.requests import Load, Store
from tests.codec.synthetic import SyntheticModel

from kvtc_vllm.codec.kernels.chunks import RowLayout, shares, steps, waves  # isort: skip
from kvtc_vllm.codec.kernels.paged import block_slots, rotations  # isort: skip
from kvtc_vllm.codec.kernels.paged_codec import PAGED_CODECS  # isort: skip
from kvtc_vllm.codec.kernels.paged_io import scatter_rows  # isort: skip
from kvtc_vllm.codec.kernels.paged_reader import that_fit  # isort: skip
from kvtc_vllm.codec.kernels.payload_coding import StoredPayloads  # isort: skip

# Some ten seconds each in the interpreter.
pytestmark = pytest.mark.slow

MODEL = SyntheticModel(
    num_layers=3, num_kv_heads=2, head_size=8, head_size_v=12, layer_groups=((0, 1), (1, 3))
)
BLOCK, PAGE, BLOCKS_A_CHUNK = 4, 2, 2
TOKENS = BLOCK * BLOCKS_A_CHUNK
IDENTITY = bytes(range(16))
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, *FP8]
SCALES = {"k": torch.tensor([0.3, 1.0, 0.02]), "v": torch.tensor([0.07, 0.11, 3.0])}
"""Of fp8 caches; the others have none."""


@pytest.fixture(autouse=True)
def side_stream(request):
    """As in serving, which uses no default stream."""
    device = getattr(request.node, "callspec", None) and request.node.callspec.params.get("device")
    with SideStream(torch.device(device or "cpu")).to_end():
        yield


@pytest.fixture(scope="module")
def artifact(request):
    """Of the codec that the parameter names."""
    return artifact_of(request.param, MODEL, (4.0, 8.0))


EACH = pytest.mark.parametrize("artifact", ALL, indirect=True)
FIRST = pytest.mark.parametrize("artifact", ["kvtc"], indirect=True)
SECOND = pytest.mark.parametrize("artifact", ["kvtc2"], indirect=True)


def write(cache, slots, k, v):
    """Fill slots with K and V [T, L, H, D] in the cache dtype, exactly."""
    plain = rotations([None] * MODEL.num_layers, cache.k.device)
    slots = slots.to(cache.k.device)
    for side, x in ((cache.k.scaled(None), k), (cache.v.scaled(None), v)):
        rows = x.flatten(1).float().to(side.device)
        scatter_rows(side, slots, slots, plain, None, rows)


def make(artifact, device, dtype=torch.bfloat16, precision="float32", layout="NHD", **options):
    cache = paged_cache(layout, 3, 32, 2, PAGE, 8, 12, dtype, device)
    if dtype in FP8:
        artifact = replace(artifact, scales=SCALES)
    made = PAGED_CODECS[artifact.codec]
    codec = made(artifact, 8.0, cache, BLOCK, IDENTITY, precision, **options)
    return codec, REFERENCE[artifact.codec](artifact, 8.0, dtype, IDENTITY)


STORES = [
    Store([3, 9], 0, b"first"),
    Store([1, 0], TOKENS, b"second"),
    Store([7, 2], 2 * TOKENS, b"third"),
]


def chunk_of(store, seed, dtype):
    """K and V of the synthetic model as a cache of this dtype holds them, with a floating sink."""
    k, v = MODEL.chunk(TOKENS, store.start, seed, torch.float32)
    both = k, mark(v, [6])
    scales = [SCALES[kind][:, None, None] if dtype in FP8 else None for kind in "kv"]
    return tuple(to_cache(x, scale, dtype) for x, scale in zip(both, scales, strict=True))


def filled(codec, dtype=torch.bfloat16):
    """Write three chunks of the synthetic model into the cache; returns them."""
    chunks = [chunk_of(store, 5 + i, dtype) for i, store in enumerate(STORES)]
    for store, (k, v) in zip(STORES, chunks, strict=True):
        write(codec.cache, block_slots(store.block_ids, BLOCK), k, v)
    return chunks


def encoded(codec):
    blobs = codec.encode_staged(codec.stage(STORES))
    assert not any(isinstance(blob, CodecError) for blob in blobs), blobs
    return blobs


def differing(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of elements that differ, after checking that none differs by much.

    In float32 the order in which products are summed shows, and does not count.
    """
    # One step of fp8 is up to a quarter of the value.
    tolerance = 0.26 if a.dtype in FP8 else 0.02
    exact_dtype = a.dtype
    a, b = a.float().cpu(), b.float().cpu()
    assert torch.allclose(a, b, rtol=tolerance, atol=0.02), (a - b).abs().max()
    rounding = 1e-4 * b.abs().clamp_min(0.1) if exact_dtype == torch.float32 else 0.0
    return float(((a - b).abs() > rounding).float().mean())


def of_both(cases, quick):
    """Cases of version 1, and of codec 2; all but `quick` of these in the long run only."""
    later = ALL[1].marks
    cases = [(quick == case, case if isinstance(case, tuple) else (case,)) for case in cases]
    own = [pytest.param("kvtc2", *case, marks=() if now else later) for now, case in cases]
    return [("kvtc", *case) for _, case in cases] + own


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("artifact", "dtype"), of_both(DTYPES, torch.bfloat16), indirect=["artifact"]
)
def test_blobs_are_those_of_the_cpu_codec(artifact, device, dtype):
    codec, reference = make(artifact, device, dtype)
    chunks = filled(codec, dtype)
    for store, (k, v), blob in zip(STORES, chunks, encoded(codec), strict=True):
        expected = reference.encode(k, v, store.start, store.key)
        if device == "cpu":  # the same matrix product, hence the same bytes
            assert blob == expected
        decoded = reference.decode(blob, store.start, TOKENS, store.key)
        wanted = reference.decode(expected, store.start, TOKENS, store.key)
        assert differing(decoded.k, wanted.k) < 0.02
        assert differing(decoded.v, wanted.v) < 0.02


@EACH
@pytest.mark.parametrize("device", DEVICES)
def test_weights_are_in_the_matrices(artifact, device):
    """Each reads the other's blobs as its own, and they are not those without weights."""
    sections = {
        key: replace(section, weights=torch.linspace(0.5, 2.0, len(section.mean)))
        for key, section in artifact.sections.items()
    }
    plain, _ = make(artifact, device)
    codec, reference = make(replace(artifact, sections=sections), device)
    chunks = filled(codec)
    blobs = encoded(codec)
    filled(plain)
    assert blobs != encoded(plain)
    targets = [[4, 11], [15, 6], [5, 10]]
    for store, (k, v), blob, blocks in zip(STORES, chunks, blobs, targets, strict=True):
        expected = reference.encode(k, v, store.start, store.key)
        decoded = reference.decode(blob, store.start, TOKENS, store.key)
        wanted = reference.decode(expected, store.start, TOKENS, store.key)
        assert differing(decoded.k, wanted.k) < 0.02
        assert differing(decoded.v, wanted.v) < 0.02
        load = Load(store.start, blocks, key=store.key)
        assert codec.load([(load, expected)], TOKENS) == [None]
        slots = block_slots(blocks, BLOCK)
        loaded = [read_slots(side, slots) for side in (codec.cache.k, codec.cache.v)]
        assert differing(loaded[0], wanted.k) < 0.02
        assert differing(loaded[1], wanted.v) < 0.02


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("artifact", "dtype", "layout"),
    of_both(
        [*zip(DTYPES, ["NHD", "apart", "HND", "NHD", "HND"], strict=True)],
        None,
    ),
    indirect=["artifact"],
)
def test_loading_gives_what_the_cpu_codec_gives(artifact, device, dtype, layout):
    codec, reference = make(artifact, device, dtype, layout=layout)
    blobs = [
        reference.encode(*chunk, store.start, store.key)
        for store, chunk in zip(STORES, filled(codec, dtype), strict=True)
    ]
    targets = [[4, 11], [15, 6], [5, 10]]
    loads = [
        (Load(store.start, blocks, key=store.key), blob)
        for blob, store, blocks in zip(blobs, STORES, targets, strict=True)
    ]
    assert codec.load(loads, TOKENS) == [None] * 3
    for blob, store, blocks in zip(blobs, STORES, targets, strict=True):
        slots = block_slots(blocks, BLOCK).to(device)
        wanted = reference.decode(blob, store.start, TOKENS, store.key)
        assert differing(read_slots(codec.cache.k, slots), wanted.k) < 0.02
        assert differing(read_slots(codec.cache.v, slots), wanted.v) < 0.02
        sinks = 4 if store.start == 0 else 0
        for side, exact in ((codec.cache.k, wanted.k), (codec.cache.v, wanted.v)):
            found = read_slots(side, slots)[:sinks].cpu()
            assert torch.equal(found.view(torch.uint8), exact[:sinks].view(torch.uint8))


@EACH
@pytest.mark.parametrize("device", DEVICES)
def test_float16_operands_cost_little(artifact, device):
    codec, reference = make(artifact, device, precision="float16")
    chunks = filled(codec)
    blobs = encoded(codec)
    for store, (k, v), blob in zip(STORES, chunks, blobs, strict=True):
        exact = reference.decode(reference.encode(k, v, store.start), store.start)
        ours = reference.decode(blob, store.start, key=store.key)
        for x, exact_x, our_x in ((k, exact.k, ours.k), (v, exact.v, ours.v)):
            error = (exact_x.float() - x.float()).square().sum()
            assert (our_x.float() - x.float()).square().sum() < 1.02 * error
    loads = [(Load(s.start, s.block_ids, key=s.key), b) for b, s in zip(blobs, STORES, strict=True)]
    assert codec.load(loads, TOKENS) == [None] * 3
    for store, blob in zip(STORES, blobs, strict=True):
        wanted = reference.decode(blob, store.start, TOKENS, store.key)
        slots = block_slots(store.block_ids, BLOCK).to(device)
        differing(read_slots(codec.cache.k, slots), wanted.k)
        differing(read_slots(codec.cache.v, slots), wanted.v)


@EACH
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", [0, TOKENS])
def test_only_wanted_blocks_are_written(artifact, device, start):
    codec, reference = make(artifact, device)
    k, v = MODEL.chunk(TOKENS, start, 5)
    blob = reference.encode(k, v, start)
    everything = torch.arange(32 * PAGE, device=device)
    before = read_slots(codec.cache.k, everything).clone()
    assert codec.load([(Load(start, [12], first_block=1), blob)], TOKENS) == [None]
    after = read_slots(codec.cache.k, everything)
    written = block_slots([12], BLOCK).to(device)
    wanted = reference.decode(blob).k[BLOCK:]
    assert differing(after[written], wanted) < 0.02
    after[written] = before[written]
    assert torch.equal(after, before)


@EACH
@pytest.mark.parametrize("device", DEVICES)
def test_a_small_workspace_gives_the_same(artifact, device):
    roomy, _ = make(artifact, device)
    tight, _ = make(artifact, device, workspace_bytes=1)
    filled(roomy)
    filled(tight)
    blobs = encoded(roomy)
    assert encoded(tight) == blobs
    loads = [(Load(s.start, s.block_ids, key=s.key), b) for b, s in zip(blobs, STORES, strict=True)]
    assert roomy.load(loads, TOKENS) == tight.load(loads, TOKENS) == [None] * 3
    everything = torch.arange(32 * PAGE, device=device)
    for mine, other in ((roomy.cache.k, tight.cache.k), (roomy.cache.v, tight.cache.v)):
        assert torch.equal(read_slots(mine, everything), read_slots(other, everything))


@EACH
@pytest.mark.parametrize("device", DEVICES)
def test_bad_chunks_fail_alone(artifact, device):
    codec, reference = make(artifact, device)
    filled(codec)
    good = bytes(encoded(codec)[1])
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    k, v = MODEL.chunk(TOKENS, TOKENS, 6)
    other = REFERENCE[artifact.codec](artifact, 4.0, torch.bfloat16, IDENTITY)
    loads = [
        (Load(TOKENS, [0, 1], key=b"second"), bytes(damaged)),
        (Load(TOKENS, [2, 3], key=b"second"), good),
        (Load(TOKENS, [4, 5], key=b"third"), good),
        (Load(TOKENS, [6, 7], key=b"second"), _with_a_longer_body(good)),
        (Load(TOKENS, [8, 9]), other.encode(k, v, TOKENS)),
    ]
    errors = codec.load(loads, TOKENS)
    reasons = [None if error is None else error.reason for error in errors]
    assert reasons == ["checksum", None, "fingerprint", "entropy", "geometry"]
    slots = block_slots([2, 3], BLOCK).to(device)
    wanted = reference.decode(good, key=b"second")
    assert differing(read_slots(codec.cache.k, slots), wanted.k) < 0.02


def _with_a_longer_body(blob: bytes) -> bytes:
    """The blob with units that do not fill its last section, under a valid checksum."""
    info = parse(blob)
    sections = []
    for s in info.sections:
        body = blob[s.offset : s.offset + s.stored_length]
        sections.append(
            NewSection(
                SectionKind(s.kind),
                s.coder_id,
                s.group,
                s.raw_length,
                EncodedSection(s.units, body),
            )
        )
    last = sections[-1]
    longer = EncodedSection(last.encoded.units, last.encoded.body + bytes(4))
    sections[-1] = replace(last, encoded=longer)
    return build(info.header, sections)


def resealed(blob: bytes, number: int, coded: EncodedSection, raw_length: int) -> bytes:
    """The blob with another section, under a valid checksum."""
    info = parse(blob)
    sections = [
        NewSection(
            SectionKind(s.kind),
            s.coder_id,
            s.group,
            raw_length if i == number else s.raw_length,
            coded
            if i == number
            else EncodedSection(s.units, blob[s.offset : s.offset + s.stored_length]),
        )
        for i, s in enumerate(info.sections)
    ]
    return build(info.header, sections)


def uneven(blob: bytes) -> list[bytes]:
    """Blobs of codec 2 whose marks or escapes do not fit the rest, under valid checksums."""
    first, *others = parse(blob).sections
    assert first.kind == SectionKind.MARKS
    (bitmap,) = read_section(first, memoryview(blob))
    assert bitmap == 1 << 6
    found = [
        resealed(blob, 0, EncodedSection((), bytes([other])), 1) for other in (0, 1 << 6 | 1, 0xFF)
    ]
    for number in (1, len(others)):
        payload = read_section(others[number - 1], memoryview(blob))
        found += [
            resealed(blob, number, DEFLATE.encode([bytes(other)]), len(other))
            for other in (payload + b"\0", b"\xff" * len(payload))
        ]
    return found


@SECOND
@pytest.mark.parametrize("device", DEVICES)
def test_chunks_whose_marks_and_escapes_do_not_fit_fail_alone(artifact, device):
    codec, reference = make(artifact, device)
    store = STORES[1]
    k, v = chunk_of(store, 5, torch.bfloat16)
    good = reference.encode(k, v, store.start, store.key)
    bad = uneven(good)
    for blob in bad:
        with pytest.raises(ContainerError) as caught:
            reference.decode(blob, store.start, TOKENS, store.key)
        assert caught.value.reason == "bounds"
    blobs = [*bad[:3], good, *bad[3:]]
    loads = [
        (Load(store.start, [2 * i, 2 * i + 1], key=store.key), blob) for i, blob in enumerate(blobs)
    ]
    reasons = [error and error.reason for error in codec.load(loads, TOKENS)]
    assert reasons == [*["bounds"] * 3, None, *["bounds"] * (len(bad) - 3)]
    slots = block_slots([6, 7], BLOCK).to(device)
    wanted = reference.decode(good, store.start, TOKENS, store.key)
    assert differing(read_slots(codec.cache.k, slots), wanted.k) < 0.02
    assert differing(read_slots(codec.cache.v, slots), wanted.v) < 0.02


@EACH
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("token", "value"), [(0, float("nan")), (0, 3e38), (6, float("inf")), (6, 3e38)]
)
def test_chunks_that_cannot_be_coded_are_refused_alone(artifact, device, token, value):
    codec, _ = make(artifact, device)
    filled(codec)
    k, v = MODEL.chunk(TOKENS, 0, 5)
    v[token, 1, 0, 3] = value
    write(codec.cache, block_slots(STORES[0].block_ids, BLOCK), k, v)
    results = codec.encode_staged(codec.stage(STORES))
    sink = token < 4
    if sink and value == 3e38:
        assert not isinstance(results[0], CodecError)
    else:
        assert isinstance(results[0], CodecError)
        assert ("non-finite" in str(results[0])) == (value != 3e38)
    assert not isinstance(results[1], CodecError)
    late = Store([3, 9], MODEL.max_positions - 1)
    assert "RoPE" in str(codec.encode_staged(codec.stage([late]))[0])
    assert codec.encode_staged(codec.stage([])) == []
    assert codec.load([], TOKENS) == []


@EACH
@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_of_another_shape_is_refused(artifact, device):
    cache = paged_cache("NHD", 3, 4, 1, PAGE, 8, 12, torch.bfloat16, device)
    with pytest.raises(ValueError, match="artifact"):
        PAGED_CODECS[artifact.codec](artifact, 8.0, cache, BLOCK)


@EACH
@pytest.mark.parametrize("device", DEVICES)
def test_sizes_are_reported(artifact, device):
    codec, _ = make(artifact, device, precision="float16")
    staged = codec.stage(STORES[1:])
    assert staged.nbytes == codec.staging_bytes(2 * TOKENS)
    # Of the ratio in use only, though the artifact has another plan that reads more columns.
    ranks = {key: section.plans[8.0].total_rank for key, section in artifact.sections.items()}
    assert any(section.rank > ranks[key] for key, section in artifact.sections.items())
    # Of codec 2, the columns of each width are filled up, and so is what is beyond them.
    filled_up = {"kvtc": 2, "kvtc2": 6}[artifact.codec]
    bases = sum(
        2 * artifact.geometry.row_size(*key) * (rank + filled_up * 64)
        for key, rank in ranks.items()
    )
    tables = artifact.ropes[0].cos_sin.nbytes
    assert codec.resident.nbytes <= bases + tables + 4 * artifact.geometry.token_elements()


@FIRST
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_outside_float16_is_a_damaged_chunk(artifact, device):
    """Rows cross memory in 16 bits: what does not fit is told, not written as another number."""
    # Small weights: coefficients are in range where rows are not.
    sections = {
        key: replace(section, weights=torch.full_like(section.mean, 0.01))
        for key, section in artifact.sections.items()
    }
    artifact = replace(artifact, sections=sections)
    codec, reference = make(artifact, device, precision="float16")
    k, v = MODEL.chunk(TOKENS, TOKENS, 5, torch.float32)
    v[2] *= 2e4 / v[2].abs().max()
    v[3] *= 4e5 / v[3].abs().max()
    blobs = [reference.encode(k.bfloat16(), v.bfloat16(), TOKENS)]
    v[3] = v[4]
    blobs.append(reference.encode(k.bfloat16(), v.bfloat16(), TOKENS))
    loads = [(Load(TOKENS, [2 * i, 2 * i + 1]), blob) for i, blob in enumerate(blobs)]
    found = [error and error.reason for error in codec.load(loads, TOKENS)]
    assert found == ["bounds", None]


def test_every_codec_that_says_so_has_kernels():
    said = {name for name, spec in CODECS.items() if spec.has_kernels and spec.needs_artifact}
    assert said == set(PAGED_CODECS)


def test_waves_are_cut_to_what_fits():
    def stored(size, marks):
        return StoredPayloads(0, np.array([size]), np.arange(8) < marks)

    own = {2: stored(16, 2), 3: stored(17, 0), 5: stored(1, 8), 6: stored(1, 1), 7: stored(999, 1)}
    wave = slice(2, 8)
    assert that_fit(wave, own, (10_000, 100)) == [wave]
    assert that_fit(wave, own, (48, 100)) == [slice(2, 5), slice(5, 7), slice(7, 8)]
    assert that_fit(wave, own, (10_000, 8)) == [slice(2, 5), slice(5, 6), slice(6, 8)]
    assert that_fit(wave, {}, (0, 0)) == [wave]


def test_rows_and_steps():
    layout = RowLayout.of([12, 16, 0, 16])
    assert (layout.members, layout.lengths) == ((0, 1, 3), (12, 16))
    assert layout.table.tolist() == [[0, 12, 0], [12, 16, 1], [28, 16, 1]]
    assert layout.num_rows == 44
    assert layout.part(slice(1, 3)).table.tolist() == [[0, 16, 0], [16, 16, 0]]
    assert layout.in_row_order(lambda i: torch.full((layout.tokens[0],), i)).tolist() == (
        [0] * 12 + [1] * 12 + [3] * 12
    )
    assert RowLayout.of([0]).table.shape == (0, 3)
    assert steps([5, 5, 20, 1], 10) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert steps([], 10) == []
    assert waves(10, 2, 4) == [slice(0, 2), slice(2, 6), slice(6, 10)]
    assert waves(3, 4, 4) == [slice(0, 3)]
    assert waves(3, 8, 1) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert waves(0, 2, 4) == []
    assert [list(part) for part in shares(7)] == [[0], [1, 2, 3, 4], [5, 6]]
    assert [i for part in shares(0) for i in part] == []
    assert issubclass(ContainerError, CodecError)
