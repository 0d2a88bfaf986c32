"""Chunks as LMCache holds them <-> K and V by token.

    fused, server-driven copies   [1, L, T, heads * (K | V)]
    fused, engine-driven copies      [L, T, heads * (K | V)]
    split                         [2, L, T, heads * D]          K first, then V

A fused row holds K then V of head 0, K then V of head 1, and so on: vLLM's paged layout since
0.26, token by token. The CPU backend orders the bytes inside a page differently (K transposed,
say), and LMCache copies pages as they are, so there the token axis is not tokens; whoever
configures a CPU server says so with page_order "cpu".
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.container import DTYPE_CODES

if TYPE_CHECKING:
    from kvtc_vllm.vllm_cache.layout import PagedLayout


class LayoutRefused(Exception):
    """A chunk of a shape or dtype that can't be coded; the text says which and why."""


class ChunkView(Protocol):
    """One chunk's memory, read and written by token."""

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K [T, L, H, D] and V [T, L, H, Dv]; may share memory with the chunk."""
        ...

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Overwrite the whole chunk."""
        ...


def check_chunk(shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """Element type of a chunk that consists of one tensor. Raises LayoutRefused."""
    if len(shapes) != 1:
        raise LayoutRefused(
            f"the chunk has {len(shapes)} tensors {[tuple(s) for s in shapes]}, one per kind of "
            "layer (windows, recurrent states); below LMCache KVTC codes models with layers of one "
            "kind: serve the model with KVTCConnector, or if it has windows only with "
            "--disable-hybrid-kv-cache-manager"
        )
    # Of an fp8 chunk LMCache tells neither the kind of fp8 nor its scales.
    if dtypes[0] not in DTYPE_CODES or dtypes[0].itemsize == 1:
        raise LayoutRefused(
            f"the chunk is {str(dtypes[0]).removeprefix('torch.')}; KVTC reads 16- and 32-bit "
            "caches: use kv_cache_dtype auto, bfloat16 or float16"
        )
    return dtypes[0]


def tokens_of(shape: Sequence[int]) -> int:
    """T of a chunk of any of the shapes above. Raises LayoutRefused."""
    if len(shape) not in (3, 4):
        raise LayoutRefused(f"the chunk is {tuple(shape)}; three or four dimensions are known")
    return int(shape[-2])


def view_chunk(chunk: torch.Tensor, geometry: Geometry, page_tokens: int | None) -> ChunkView:
    """How to read and write this chunk.

    chunk: contiguous, on the CPU, of one of the shapes above. page_tokens: tokens per page of the
    CPU backend, None for the packed order. Raises LayoutRefused.
    """
    if tokens_of(chunk.shape) == 0:
        raise LayoutRefused(f"the chunk {tuple(chunk.shape)} holds no token")
    layers, heads = geometry.num_layers, geometry.num_kv_heads
    size, size_v = geometry.head_size, geometry.head_size_v
    shape = tuple(chunk.shape)
    fused = shape[-1] == heads * (size + size_v)
    if fused and (len(shape) == 3 or shape[0] == 1) and shape[-3] == layers:
        rows = chunk.view(layers, shape[-2], heads, size + size_v)
        if page_tokens is None:
            return _Packed(rows, size)
        return _Pages(rows, geometry, page_tokens)
    split = len(shape) == 4 and shape[0] == 2 and size == size_v and shape[-1] == heads * size
    if split and shape[1] == layers and page_tokens is None:
        return _Split(chunk.view(2, layers, shape[-2], heads, size))
    raise LayoutRefused(
        f"the chunk is {shape}; the artifact is for {layers} layers of {heads} heads, K {size} and "
        f"V {size_v} wide: [1, {layers}, T, {heads * (size + size_v)}] (KV cache layout, model "
        "or tensor and pipeline parallel sizes differ)"
    )


class _Packed:
    """[L, T, H, D + Dv]."""

    def __init__(self, rows: torch.Tensor, head_size: int) -> None:
        self._rows, self._head_size = rows, head_size

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._rows.transpose(0, 1)
        return rows[..., : self._head_size], rows[..., self._head_size :]

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        rows = self._rows.transpose(0, 1)
        rows[..., : self._head_size] = k
        rows[..., self._head_size :] = v


class _Split:
    """[2, L, T, H, D]."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rows[0].transpose(0, 1), self._rows[1].transpose(0, 1)

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self._rows[0] = k.transpose(0, 1)
        self._rows[1] = v.transpose(0, 1)


class _Pages:
    """[L, T, H, D + Dv] whose T are whole pages of the CPU backend.

    The connector's own reader learns the order inside a page from vLLM's operator; a page of the
    chunk seen as [heads, tokens, K|V] is what it expects of a paged cache.
    """

    def __init__(self, rows: torch.Tensor, geometry: Geometry, page_tokens: int) -> None:
        tokens = rows.shape[1]
        if tokens % page_tokens:
            raise LayoutRefused(f"{tokens} tokens per chunk are not whole pages of {page_tokens}")
        pages = rows.unflatten(1, (tokens // page_tokens, page_tokens)).transpose(2, 3)
        self._blocks = list(range(tokens // page_tokens))
        self._layout = _paged_layout(pages, geometry, page_tokens)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._layout.gather(self._blocks)

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self._layout.scatter(self._blocks, k, v)


def load_page_reader() -> None:
    """Import what reads the CPU backend's pages: seconds, better at start than at the first chunk.

    Raises LayoutRefused without vLLM.
    """
    try:
        for name in (
            "kvtc_vllm.vllm_cache.layout",
            "vllm._custom_ops",
            "vllm.v1.attention.backends.cpu_attn",
        ):
            importlib.import_module(name)
    except ImportError as error:
        raise LayoutRefused(f'page_order "cpu" needs vLLM beside LMCache: {error}') from error


def _paged_layout(pages: torch.Tensor, geometry: Geometry, page_tokens: int) -> PagedLayout:
    """pages: [L, blocks, H, tokens, D + Dv], any strides. Raises LayoutRefused."""
    load_page_reader()
    from kvtc_vllm.offload.geometry import CacheGroup
    from kvtc_vllm.vllm_cache.compat import UnsupportedError
    from kvtc_vllm.vllm_cache.layout import PagedLayout

    names = tuple(f"layers.{i}" for i in range(geometry.num_layers))
    group = CacheGroup(
        layer_names=names,
        block_size=page_tokens,
        num_kv_heads=geometry.num_kv_heads,
        head_size=geometry.head_size,
        head_size_v=geometry.head_size_v,
        dtype=pages.dtype,
    )
    try:
        return PagedLayout(dict(zip(names, pages, strict=True)), group)
    except UnsupportedError as error:
        raise LayoutRefused(str(error)) from error
