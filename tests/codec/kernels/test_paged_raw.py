"""`raw` in batches against `RawCodec`, chunk by chunk, bit for bit."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.raw import RawCodec
from tests.codec.kernels.devices import DEVICES
from tests.codec.kernels.paged_caches import LAYOUTS, paged_cache, read_slots
from tests.codec.kernels.requests import Load, Store

from kvtc_vllm.codec.kernels import paged_raw  # isort: skip
from kvtc_vllm.codec.kernels.paged import block_slots  # isort: skip
from kvtc_vllm.codec.kernels.paged_raw import PagedRawCodec  # isort: skip

LAYERS, HEADS, SIZE, SIZE_V = 3, 2, 8, 12
GEOMETRY = Geometry(LAYERS, HEADS, SIZE, SIZE_V, ((0, LAYERS),))
BLOCK, PAGE = 4, 2
TOKENS = 2 * BLOCK
IDENTITY = bytes(range(16))
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
STORES = [Store([3, 9], 0, b"a"), Store([1, 0], TOKENS, b"b"), Store([7, 2], 2 * TOKENS, b"c")]


def make(device, layout="NHD", dtype=torch.bfloat16, **options):
    cache = paged_cache(layout, LAYERS, 32, HEADS, PAGE, SIZE, SIZE_V, dtype, device)
    return cache, PagedRawCodec(GEOMETRY, cache, BLOCK, IDENTITY, **options)


def in_bytes(x):
    return x.cpu().contiguous().view(torch.uint8)


def everything(cache):
    slots = torch.arange(32 * PAGE, device=cache.k.device)
    return [in_bytes(read_slots(side, slots)) for side in (cache.k, cache.v)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_become_raw_blobs_and_come_back(device, layout, dtype):
    cache, codec = make(device, layout, dtype)
    noise = torch.randint(0, 256, (BLOCK // PAGE, HEADS, PAGE, SIZE * dtype.itemsize))
    # Every kind of NaN has to survive.
    pages = slice(3 * BLOCK // PAGE, 4 * BLOCK // PAGE)
    cache.k.views[1][pages] = noise.to(torch.uint8).view(dtype).to(device)
    reference = RawCodec(GEOMETRY, dtype, IDENTITY)
    blobs = codec.encode_staged(codec.stage(STORES))
    wanted = []
    for store, blob in zip(STORES, blobs, strict=True):
        slots = block_slots(store.block_ids, BLOCK).to(device)
        k, v = (read_slots(side, slots).cpu() for side in (cache.k, cache.v))
        assert blob == reference.encode(k, v, store.start, store.key)
        wanted.append((in_bytes(k), in_bytes(v)))
    loads = [
        (Load(store.start, blocks, key=store.key), blob)
        for store, blocks, blob in zip(STORES, [[4, 11], [15, 6], [5, 10]], blobs, strict=True)
    ]
    assert codec.load(loads, TOKENS) == [None] * 3
    for (load, _), (k, v) in zip(loads, wanted, strict=True):
        slots = block_slots(load.block_ids, BLOCK).to(device)
        assert torch.equal(in_bytes(read_slots(cache.k, slots)), k)
        assert torch.equal(in_bytes(read_slots(cache.v, slots)), v)


@pytest.mark.parametrize("device", DEVICES)
def test_bad_chunks_and_unwanted_blocks_are_left_alone(device):
    cache, codec = make(device, workspace_bytes=1)
    first, second, third = codec.encode_staged(codec.stage(STORES))
    damaged = bytearray(second)
    damaged[-20] ^= 1
    before = everything(cache)
    loads = [
        (Load(TOKENS, [4, 5], key=b"b"), bytes(damaged)),
        (Load(0, [12], first_block=1, key=b"a"), first),
        (Load(TOKENS, [6, 8], key=b"b"), third),
    ]
    errors = codec.load(loads, TOKENS)
    assert [error and error.reason for error in errors] == ["checksum", None, "fingerprint"]
    slots = block_slots([12], BLOCK)
    source = block_slots([9], BLOCK)
    for old, new in zip(before, everything(cache), strict=True):
        assert torch.equal(new[slots], old[source])
        new[slots] = old[slots]
        assert torch.equal(new, old)


@pytest.mark.parametrize("device", DEVICES)
def test_launches_do_not_grow_with_layers_and_chunks(device, monkeypatch):
    """One a layer and chunk would make a baseline that anything beats."""
    _, codec = make(device)
    launches = []
    move = paged_raw.move_rows
    monkeypatch.setattr(paged_raw, "move_rows", lambda *args: (launches.append(1), move(*args)))
    blobs = codec.encode_staged(codec.stage(STORES))
    assert len(launches) == 1
    codec.load(
        [(Load(s.start, s.block_ids, key=s.key), b) for s, b in zip(STORES, blobs, strict=True)],
        TOKENS,
    )
    assert len(launches) == 2
    assert codec.encode_staged(codec.stage([])) == codec.load([], TOKENS) == []


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_is_refused(device):
    cache = paged_cache("NHD", LAYERS, 8, HEADS, PAGE, SIZE, SIZE_V, torch.bfloat16, device)
    with pytest.raises(ValueError, match="artifact"):
        PagedRawCodec(Geometry(LAYERS, HEADS, SIZE, SIZE, ((0, LAYERS),)), cache, BLOCK)
    odd = paged_cache("NHD", 1, 8, 1, 1, 3, 1, torch.float8_e5m2, device)
    with pytest.raises(ValueError, match="whole units"):
        PagedRawCodec(Geometry(1, 1, 3, 1, ((0, 1),)), odd, 2)
