"""Three chunks of a made-up model in a paged cache, for tests of batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.codec.transform import to_cache
from tests.codec.kernels.codecs import ALL, LATER, PAIRED, REFERENCE, mark
from tests.codec.kernels.paged_caches import paged_cache
from tests.codec.kernels.requests import Store
from tests.codec.synthetic import SyntheticModel

from kvtc_vllm.codec.kernels.paged import block_slots  # isort: skip
from kvtc_vllm.codec.kernels.paged_codec import PAGED_CODECS  # isort: skip
from kvtc_vllm.codec.kernels.paged_io import scatter_rows  # isort: skip
from kvtc_vllm.codec.kernels.row_table import RowTable  # isort: skip

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
EACH = pytest.mark.parametrize("artifact", ALL, indirect=True)
FIRST = pytest.mark.parametrize("artifact", ["kvtc"], indirect=True)
SECOND = pytest.mark.parametrize(
    "artifact", ["kvtc2", pytest.param(PAIRED, marks=LATER)], indirect=True
)


def write(cache, slots, k, v):
    """Fill slots with K and V [T, L, H, D] in the cache dtype, exactly."""
    slots = slots.to(cache.k.device)
    rows = torch.cat((k.flatten(1), v.flatten(1)), dim=1).float().to(cache.k.device)
    scatter_rows(RowTable.exact(cache.scaled(None), rows.shape[1]), slots, slots, None, rows)


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
