"""Every layout that is known reads and writes by token; every other one is refused by name."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.lmcache.layout import LayoutRefused, check_chunk, tokens_of, view_chunk

L, T, H, D = 3, 8, 2, 4
GEOMETRY = Geometry(L, H, D, D, ((0, L),))
K = torch.arange(T * L * H * D).view(T, L, H, D).to(torch.bfloat16)
V = (K * 2 + 1).to(torch.bfloat16)


def layouts() -> dict[str, torch.Tensor]:
    rows = torch.cat((K, V), dim=-1).transpose(0, 1).flatten(2)
    split = torch.stack((K, V)).transpose(1, 2).flatten(3)
    return {
        "fused": rows[None].contiguous(),
        "engine-driven": rows.contiguous(),
        "split": split.contiguous(),
    }


@pytest.mark.parametrize("name", ["fused", "engine-driven", "split"])
def test_reads_and_writes_by_token(name: str) -> None:
    chunk = layouts()[name]
    k, v = view_chunk(chunk, GEOMETRY, None).read()
    assert torch.equal(k, K)
    assert torch.equal(v, V)
    empty = torch.zeros_like(chunk)
    view_chunk(empty, GEOMETRY, None).write(K, V)
    assert torch.equal(empty, chunk)
    assert tokens_of(chunk.shape) == T


def test_unequal_heads_of_k_and_v() -> None:
    geometry = Geometry(L, H, D, 2 * D, ((0, L),))
    v = torch.cat((V, V), dim=-1)
    chunk = torch.cat((K, v), dim=-1).transpose(0, 1).flatten(2)[None].contiguous()
    got_k, got_v = view_chunk(chunk, geometry, None).read()
    assert torch.equal(got_k, K)
    assert torch.equal(got_v, v)


@pytest.mark.parametrize(
    "shape",
    [
        (1, L + 1, T, H * 2 * D),  # another model, or a pipeline stage
        (1, L, T, H * D),  # half of the heads
        (2, L, T, H * 2 * D),  # neither fused nor split
        (1, L, T, 576),  # MLA
        (L, T, H, 2 * D, 1),
        (T, H * 2 * D),
        (1, L, 0, H * 2 * D),
    ],
)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutRefused, match="the chunk"):
        view_chunk(torch.zeros(shape, dtype=torch.bfloat16), GEOMETRY, None)


def test_dtypes_and_several_tensors_are_refused() -> None:
    one = torch.Size((1, L, T, H * 2 * D))
    assert check_chunk([one], [torch.float16]) == torch.float16
    with pytest.raises(LayoutRefused, match="uint8"):
        check_chunk([one], [torch.uint8])
    with pytest.raises(LayoutRefused, match="float8_e4m3fn; KVTC reads 16- and 32-bit"):
        check_chunk([one], [torch.float8_e4m3fn])
    with pytest.raises(LayoutRefused, match=r"2 tensors .*one per kind of layer .*KVTCConnector"):
        check_chunk([one, one], [torch.bfloat16, torch.bfloat16])


@pytest.mark.slow
def test_pages_of_the_cpu_backend() -> None:
    """Written as vLLM's own operator writes a page, read by token."""
    pytest.importorskip("vllm")
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    heads, size, page, tokens = 2, 64, 32, 64
    geometry = Geometry(1, heads, size, size, ((0, 1),))
    k, v = (torch.randn(tokens, heads, size).to(torch.bfloat16) for _ in range(2))
    paged = torch.zeros(tokens // page, heads, page, 2 * size, dtype=torch.bfloat16)
    k_half, v_half = paged.view(-1, heads, 2 * page, size).chunk(2, dim=2)
    isa = _get_attn_isa(torch.bfloat16, page, size)
    slots = torch.arange(tokens)
    ops.cpu_attn_reshape_and_cache(
        k, v, k_half, v_half, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    # LMCache copies a page as [tokens, heads, K|V] of the logical view.
    chunk = paged.transpose(1, 2).reshape(1, tokens, heads * 2 * size).contiguous()
    got_k, got_v = view_chunk(chunk, geometry, page).read()
    assert torch.equal(got_k[:, 0], k)
    assert torch.equal(got_v[:, 0], v)
    again = torch.zeros_like(chunk)
    view_chunk(again, geometry, page).write(got_k, got_v)
    assert torch.equal(again, chunk)
    with pytest.raises(LayoutRefused, match="whole pages"):
        view_chunk(chunk[:, :48].contiguous(), geometry, page)
