"""Batches through the paged cache against the CPU codec, chunk by chunk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.payload import BitPlan, CoefficientGroup
from kvtc_vllm.codec.registry import CODECS
from tests.codec.kernels import fake_nvcomp
from tests.codec.kernels.codecs import EVERY, LATER, PAIRED
from tests.codec.kernels.devices import DEVICES
from tests.codec.kernels.paged_batches import (
    BLOCK,
    DTYPES,
    EACH,
    MODEL,
    PAGE,
    STORES,
    TOKENS,
    differing,
    encoded,
    filled,
    make,
    write,
)
from tests.codec.kernels.paged_caches import paged_cache, read_slots
from tests.codec.kernels.requests import Load, Store
from tests.codec.synthetic import SyntheticModel

from kvtc_vllm.codec.kernels.chunks import RowLayout, shares, steps, waves  # isort: skip
from kvtc_vllm.codec.kernels.decoder import DecodeWorkspace, chunks_that_fit  # isort: skip
from kvtc_vllm.codec.kernels.deflate_nvcomp import NvcompDeflate  # isort: skip
from kvtc_vllm.codec.kernels.paged import block_slots  # isort: skip
from kvtc_vllm.codec.kernels.paged_codec import PAGED_CODECS  # isort: skip
from kvtc_vllm.codec.kernels.paged_reader import that_fit  # isort: skip
from kvtc_vllm.codec.kernels.payload_coding import StoredPayloads  # isort: skip
from kvtc_vllm.codec.kernels.unit_coders import NvcompUnitCoder  # isort: skip

# Some ten seconds each in the interpreter.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("side_stream")]


def of_all(cases, quick):
    """Cases of version 1, and of codec 2 without and with pairs; of these only what `quick` says,
    by their names, in the short run, too."""
    cases = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    own = [
        pytest.param(name, *values, marks=() if quick.get(name) == case else LATER)
        for name in EVERY[1:]
        for case, values in cases
    ]
    return [("kvtc", *values) for _, values in cases] + own


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("artifact", "dtype"),
    of_all(DTYPES, dict.fromkeys(EVERY, torch.bfloat16)),
    indirect=["artifact"],
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


WIDE = (CoefficientGroup(0, 64, "int4"), CoefficientGroup(64, 64, "int2"))
NARROW = (CoefficientGroup(0, 1, "fp8"), CoefficientGroup(1, 30, "int4"))


@pytest.mark.parametrize("device", DEVICES)
def test_sections_of_different_ranks_share_products(device):
    """Of 128 columns, of 64, and of none: zeros fill up those in the middle."""
    model = SyntheticModel(
        num_layers=3, num_kv_heads=2, head_size=64, layer_groups=((0, 1), (1, 2), (2, 3))
    )

    artifact = model.artifact((8.0,), 512)
    sections = {
        key: replace(section, plans={8.0: BitPlan(8.0, groups, 0.0)})
        for (key, section), groups in zip(
            artifact.sections.items(), [WIDE, NARROW, (), WIDE, NARROW, WIDE], strict=True
        )
    }
    artifact = replace(artifact, sections=sections)
    cache = paged_cache("NHD", 3, 8, 2, BLOCK, 64, 64, torch.bfloat16, device)
    codec = PAGED_CODECS["kvtc"](artifact, 8.0, cache, BLOCK, precision="float32")
    shapes = [(len(batch.keys), batch.shape.width) for batch in codec.resident.batches]
    assert shapes == [(5, 128), (1, 0)]
    reference = KvtcCodec(artifact, 8.0, torch.bfloat16)
    starts = (0, TOKENS)
    chunks = [model.chunk(TOKENS, start, 3) for start in starts]
    for start, (k, v) in zip(starts, chunks, strict=True):
        write(cache, torch.arange(start, start + TOKENS), k, v)
    blocks = [[2 * i, 2 * i + 1] for i in range(len(starts))]
    stores = [Store(own, start) for own, start in zip(blocks, starts, strict=True)]
    blobs = codec.encode_staged(codec.stage(stores))
    loads = [
        Load(start, [own[0] + 4, own[1] + 4]) for own, start in zip(blocks, starts, strict=True)
    ]
    assert codec.load(list(zip(loads, blobs, strict=True)), TOKENS) == [None, None]
    for load, (k, v), blob in zip(loads, chunks, blobs, strict=True):
        wanted = reference.decode(reference.encode(k, v, load.start), load.start, TOKENS)
        decoded = reference.decode(blob, load.start, TOKENS)
        slots = block_slots(load.block_ids, BLOCK).to(device)
        for side, own, exact in ((cache.k, decoded.k, wanted.k), (cache.v, decoded.v, wanted.v)):
            assert differing(own, exact) < 0.02
            assert differing(read_slots(side, slots), exact) < 0.02


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("artifact", "dtype", "layout"),
    of_all(
        [*zip(DTYPES, ["NHD", "apart", "HND", "NHD", "HND"], strict=True)],
        {PAIRED: (torch.bfloat16, "NHD")},
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
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real nvCOMP is used there")
def test_nvcomp_s_units_are_read_and_written(artifact):
    """Over a stand-in for it. Payloads of codec 2 are of all lengths, and some sections raw."""
    coder = NvcompUnitCoder(NvcompDeflate(fake_nvcomp.library()))
    codec, reference = make(artifact, "cpu", coder=coder)
    chunks = filled(codec)
    blobs = encoded(codec)
    loads = [(Load(s.start, s.block_ids, key=s.key), b) for b, s in zip(blobs, STORES, strict=True)]
    assert codec.load(loads, TOKENS) == [None] * 3
    for store, (k, v), blob in zip(STORES, chunks, blobs, strict=True):
        expected = reference.encode(k, v, store.start, store.key)
        wanted = reference.decode(expected, store.start, TOKENS, store.key)
        decoded = reference.decode(blob, store.start, TOKENS, store.key)
        assert torch.equal(decoded.k, wanted.k)
        slots = block_slots(store.block_ids, BLOCK)
        assert differing(read_slots(codec.cache.k, slots), wanted.k) < 0.02
        assert differing(read_slots(codec.cache.v, slots), wanted.v) < 0.02


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
    assert any(s.plans[4.0].rank > s.plans[8.0].rank for s in artifact.sections.values())
    # Of codec 2, the columns of each width are filled up, and so is what is beyond them.
    filled_up = {"kvtc": 2, "kvtc2": 6}[artifact.codec]
    bases = sum(
        2 * artifact.geometry.row_size(*key) * (rank + filled_up * 64)
        for key, rank in ranks.items()
    )
    tables = artifact.ropes[0].cos_sin.nbytes
    assert codec.resident.nbytes <= bases + tables + 4 * artifact.geometry.token_elements()


@EACH
@pytest.mark.parametrize("row_dtype", [torch.float16, torch.float32])
def test_what_a_step_takes_fits_the_memory_that_it_is_given(artifact, row_dtype):
    """Rows and coefficients of all sections lie in memory at a time."""
    codec, _ = make(artifact, "cpu")
    coding, cpu = codec.coding, torch.device("cpu")
    for free in (1 << 20, 5 << 20):
        chunks = chunks_that_fit(coding, row_dtype, TOKENS, free)
        assert chunks > 1
        room = DecodeWorkspace.of(coding, row_dtype, chunks, chunks, TOKENS, cpu)
        assert room.rows.numel() >= chunks * TOKENS * coding.resident.row
        taken = (*room.payloads, room.coefficients, room.rows, *room.own)
        assert 0.5 * free < sum(x.nbytes for x in taken) <= free


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
