"""Paged tensors <-> chunks, for both content layouts and any strides."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvtc_vllm.offload.geometry import CacheGroup
from kvtc_vllm.vllm_cache.compat import UnsupportedError, check_version
from kvtc_vllm.vllm_cache.geometry import layer_number
from kvtc_vllm.vllm_cache.layout import PagedLayout
from kvtc_vllm.vllm_cache.page_order import PackedOrder

GEOMETRY = CacheGroup(
    layer_names=("layers.0", "layers.1", "layers.2"),
    block_size=32,
    num_kv_heads=2,
    head_size=64,
    head_size_v=64,
    dtype=torch.bfloat16,
)


def packed(caches: dict[str, torch.Tensor], geometry: CacheGroup = GEOMETRY) -> PagedLayout:
    """A layout that reads pages as on GPU, on CPU tensors."""
    layout = PagedLayout(caches, geometry)
    layout._order = PackedOrder(geometry.head_size)
    return layout


def random_caches(blocks: int = 6, tokens: int = 32) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(blocks, 2, tokens, 128).to(torch.bfloat16)
        for name in GEOMETRY.layer_names
    }


def test_gpu_order_is_k_then_v_whatever_the_strides() -> None:
    caches = random_caches()
    # NHD: physically [blocks, tokens, heads, K|V], logically the same shape.
    strided = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in caches.items()}
    assert strided["layers.0"].stride() != caches["layers.0"].stride()
    for chosen in (caches, strided):
        k, v = packed(chosen).gather([4, 1])
        assert k.shape == v.shape == (64, 3, 2, 64)
        for layer, tensor in enumerate(caches.values()):
            for i, block in enumerate((4, 1)):
                page = tensor[block].transpose(0, 1)
                rows = slice(32 * i, 32 * i + 32)
                assert torch.equal(k[rows, layer], page[..., :64])
                assert torch.equal(v[rows, layer], page[..., 64:])


def test_kernel_blocks_smaller_than_scheduler_blocks() -> None:
    caches = random_caches(blocks=12, tokens=16)
    k, _ = packed(caches).gather([2])
    expected = caches["layers.1"][4:6].transpose(1, 2).flatten(0, 1)[..., :64]
    assert torch.equal(k[:, 1], expected)


@pytest.mark.parametrize("order", ["cpu", "gpu"])
def test_scatter_restores_exactly_and_touches_nothing_else(order: str) -> None:
    caches = random_caches()
    before = {n: t.clone() for n, t in caches.items()}
    layout = packed(caches) if order == "gpu" else PagedLayout(caches, GEOMETRY)
    k, v = layout.gather([3, 5])
    layout.zero([3, 5])
    assert all(not t[[3, 5]].any() for t in caches.values())
    layout.scatter([3, 5], k, v)
    assert all(torch.equal(caches[n], before[n]) for n in caches)
    layout.zero([3])
    layout.scatter([3], k[:32, 1:2], v[:32, 1:2], first_layer=1)
    assert torch.equal(caches["layers.1"], before["layers.1"])
    assert not caches["layers.0"][3].any()


def test_cpu_order_is_what_the_operator_writes() -> None:
    """Write keys and values with vLLM's own operator, read them with ours."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    caches = {n: torch.zeros(4, 2, 32, 128, dtype=torch.bfloat16) for n in GEOMETRY.layer_names}
    k = torch.randn(32, 2, 64).to(torch.bfloat16)
    v = torch.randn(32, 2, 64).to(torch.bfloat16)
    halves = caches["layers.1"].view(4, 2, 64, 64).chunk(2, dim=2)
    slots = torch.arange(32) + 2 * 32
    isa = _get_attn_isa(torch.bfloat16, 32, 64)
    ops.cpu_attn_reshape_and_cache(
        k, v, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    ours_k, ours_v = PagedLayout(caches, GEOMETRY).gather([2])
    assert torch.equal(ours_k[:, 1], k)
    assert torch.equal(ours_v[:, 1], v)


FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
with_fp8 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's CPU build has fp8 caches with AVX-512"
)


@with_fp8
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FP8)
def test_cpu_order_of_fp8_is_what_the_operator_writes(name: str, model_dtype: torch.dtype) -> None:
    """Every finite code, times a scale, through vLLM's operator: we read the codes."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype = FP8[name]
    geometry = dataclasses.replace(GEOMETRY, dtype=dtype, model_dtype=model_dtype)
    caches = {n: torch.zeros(4, 2, 32, 128, dtype=torch.uint8) for n in GEOMETRY.layer_names}
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    # The operator writes subnormals and -0 as 0.
    codes = codes[codes.float().isfinite() & (codes.float().abs() >= 2**-6)]
    picked = torch.randperm(2 * 32 * 2 * 64, generator=torch.Generator().manual_seed(1))
    k, v = codes[picked % len(codes)].view(2, 32, 2, 64)
    halves = caches["layers.1"].view(4, 2, 64, 64).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        (k.float() * 2).to(model_dtype),
        (v.float() / 4).to(model_dtype),
        *halves,
        torch.arange(32) + 2 * 32,
        _get_attn_isa(model_dtype, 32, 64, name),
        k_scale=2.0,
        v_scale=0.25,
        kv_cache_dtype=name,
    )
    ours_k, ours_v = PagedLayout(caches, geometry).gather([2])
    for ours, theirs in ((ours_k, k), (ours_v, v)):
        assert ours.dtype == dtype
        assert torch.equal(ours[:, 1].float(), theirs.float())


@with_fp8
@pytest.mark.parametrize("registered", [torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("order", ["cpu", "gpu"])
def test_fp8_pages_move_as_bytes(registered: torch.dtype, order: str) -> None:
    """All 256 codes, NaN included, out and back in; vLLM registers uint8."""
    geometry = dataclasses.replace(GEOMETRY, dtype=torch.float8_e4m3fn)
    caches = {
        n: torch.randint(0, 256, (6, 2, 32, 128), dtype=torch.uint8).view(registered)
        for n in GEOMETRY.layer_names
    }
    before = {n: t.view(torch.uint8).clone() for n, t in caches.items()}
    layout = PagedLayout(caches, geometry) if order == "cpu" else packed(caches, geometry)
    assert {t.dtype for t in layout.tensors} == {torch.float8_e4m3fn}
    assert [t.data_ptr() for t in layout.tensors] == [t.data_ptr() for t in caches.values()]
    k, v = layout.unpack(layout.copy([3, 5]))
    assert (k.dtype, v.dtype, k.shape) == (torch.float8_e4m3fn, torch.float8_e4m3fn, (64, 3, 2, 64))
    layout.zero([3, 5])
    assert all(not t[[3, 5]].view(torch.uint8).any() for t in caches.values())
    layout.scatter([3, 5], k, v)
    assert all(torch.equal(caches[n].view(torch.uint8), before[n]) for n in caches)
    with pytest.raises(UnsupportedError, match="uint8"):
        PagedLayout({n: t.view(torch.uint8) for n, t in caches.items()}, GEOMETRY)


def test_unexpected_caches_are_refused_by_name() -> None:
    caches = random_caches()
    with pytest.raises(UnsupportedError, match="missing"):
        PagedLayout({"layers.0": caches["layers.0"]}, GEOMETRY)
    wrong = dataclasses.replace(GEOMETRY, num_kv_heads=4)
    with pytest.raises(UnsupportedError, match=r"layers\.0: KV cache \(6, 2, 32, 128\)"):
        PagedLayout(caches, wrong)
    half = {n: t.half() for n, t in caches.items()}
    with pytest.raises(UnsupportedError, match="float16"):
        PagedLayout(half, GEOMETRY)


def test_layers_are_ordered_by_number() -> None:
    names = [f"model.layers.{i}.self_attn.attn" for i in range(12)]
    assert sorted(reversed(names), key=layer_number) == names
    with pytest.raises(UnsupportedError, match="no number"):
        layer_number("attn")


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0", "dev"])
def test_versions_outside_the_range_are_refused(version: str) -> None:
    with pytest.raises(UnsupportedError, match=r"works with 0\.26 to 0\.33"):
        check_version(version)


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.33.1.dev3"])
def test_versions_inside_the_range_pass(version: str) -> None:
    assert check_version(version) is None  # type: ignore[func-returns-value]
