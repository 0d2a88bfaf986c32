"""The serving code on caches and artifacts of true shapes, with kernels that only compile.

Matrix products and what kernels would compute are left out: numbers are whatever memory holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu.models import (
    SHAPES,
    geometry_of,
    plan_of,
    rope_table,
    section_names,
    sink_rule_of,
)
from kvtc_vllm.codec.artifact import KINDS, RankArtifact, SectionBasis
from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.kernels import bit_payloads, paged_reader, step_encoder, step_payloads
from kvtc_vllm.codec.kernels.deflate_nvcomp import copy_ranges
from kvtc_vllm.codec.kernels.paged import PagedCache
from kvtc_vllm.codec.kernels.paged_codec import PAGED_CODECS, PagedCodec
from kvtc_vllm.codec.kernels.paged_raw import PagedRawCodec
from kvtc_vllm.codec.kernels.unit_coders import UnitCoder
from kvtc_vllm.codec.rope import Rope
from tests.codec.kernels.requests import Load, Store

BLOCK = 16
CHUNK = 128
CPU = torch.device("cpu")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Case:
    """What an engine serves. heads_first: pages in the order [heads, tokens] (HND). paired: K and V
    of a layer group share a basis."""

    shape: str
    layers_per_group: int = 8
    ratio: float = 16.0
    dtype: torch.dtype = torch.bfloat16
    heads_first: bool = False
    codec: str = "kvtc"
    paired: bool = False

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        order = "HND" if self.heads_first else "NHD"
        layers = f"{self.layers_per_group} layers" + (" paired" if self.paired else "")
        return f"{self.codec} {self.shape} {layers} {self.ratio:g}x {dtype} {order}"


SERVED = (
    Case("llama-3.1-8b"),
    Case("llama-3.1-8b", dtype=torch.float16, heads_first=True),
    Case("llama-3.1-8b", dtype=torch.float8_e4m3fn),
    Case("llama-3.1-8b", dtype=torch.float8_e5m2),
    Case("llama-3.3-70b-tp2"),
    Case("mistral-nemo-12b", layers_per_group=4),
    Case("llama-3.1-8b", codec="kvtc2"),
    Case("llama-3.1-8b", dtype=torch.float8_e4m3fn, codec="kvtc2"),
    Case("llama-3.1-8b", layers_per_group=4, codec="kvtc2", paired=True),
)


def paged_cache(case: Case, tokens: int) -> PagedCache:
    """Zeros, registered as vLLM's GPU backends do: K first in the last dimension."""
    shape = SHAPES[case.shape]
    blocks, width = tokens // BLOCK, 2 * shape.head_size
    layers = []
    for _ in range(shape.layers):
        if case.heads_first:
            pages = torch.zeros(blocks, shape.kv_heads, BLOCK, width, dtype=case.dtype)
        else:
            pages = torch.zeros(blocks, BLOCK, shape.kv_heads, width, dtype=case.dtype)
            pages = pages.transpose(1, 2)
        layers.append(pages)
    return PagedCache.packed(layers, shape.head_size)


def artifact(case: Case) -> RankArtifact:
    """Plans of `models.plan_of`, bases of zeros."""
    shape = SHAPES[case.shape]
    geometry = geometry_of(shape, case.layers_per_group)
    sections = {}
    for group in range(len(geometry.layer_groups)):
        for name in section_names(case.codec, case.paired):
            p = geometry.row_size(group, name)
            plan = plan_of(case.codec, p, case.ratio)
            basis = torch.zeros(p, plan.total_rank, dtype=torch.float16)
            sections[group, name] = SectionBasis(torch.zeros(p), basis, {case.ratio: plan})
    scales = None
    if case.dtype in FP8:
        scales = {kind: torch.ones(shape.layers) for kind in KINDS}
    rope = Rope(rope_table(shape.head_size, 16384))
    layers = (0,) * shape.layers
    return RankArtifact(
        geometry,
        sections,
        (rope,),
        layers,
        b"benchmark artif.",
        scales=scales,
        codec=case.codec,
        sink_rule=sink_rule_of(case.codec),
    )


class LeftOut:
    """How much `without_products` has left out."""

    products = 0
    copies = 0


def without_products() -> None:
    """Leave matrix products, and copies of rows, out of the serving code, for the rest of this
    process: a device does them."""

    def left_out(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        LeftOut.products += 1
        return out

    def selected(self: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        LeftOut.copies += 1
        return self.new_empty((len(index), *self.shape[1:]))

    torch.Tensor.index_select = selected  # type: ignore[method-assign, assignment]

    for module in (bit_payloads, step_encoder, step_payloads):
        vars(module)["products"] = left_out


class ServedCodec:
    """The codec of an engine, and requests to it. tokens: of the cache."""

    def __init__(self, case: Case, tokens: int, coder: UnitCoder | None = None) -> None:
        self.cache = paged_cache(case, tokens)
        self.codec: PagedCodec = PAGED_CODECS[case.codec](
            artifact(case), case.ratio, self.cache, BLOCK, coder=coder
        )
        geometry = self.codec.geometry
        self.raw = PagedRawCodec(geometry, self.cache, BLOCK)
        self._blocks = CHUNK // BLOCK
        self._chunks = tokens // CHUNK

    def store(self, chunks: Iterable[int]) -> list[Blob]:
        """Chunks by their number in a sequence, as a step stores them."""
        return self._stored(self.codec, chunks)

    def load(self, chunks: Iterable[int], blobs: Iterable[Blob], first_block: int = 0) -> None:
        """Chunks as a request loads them. first_block: of each, that is wanted."""
        self._loaded(self.codec, chunks, blobs, first_block)

    def through_raw(self, chunks: list[int]) -> None:
        """Store and load as `raw`."""
        self._loaded(self.raw, chunks, self._stored(self.raw, chunks), 0)

    def _stored(self, codec: PagedCodec | PagedRawCodec, chunks: Iterable[int]) -> list[Blob]:
        stores = [Store(self._own(chunk), chunk * CHUNK) for chunk in chunks]
        if isinstance(codec, PagedCodec):
            staged = codec.stage(stores)
            # Else they are whatever memory held, and refused if it is no number.
            staged.sink_rows.zero_()
            if staged.squares is not None:
                # Two of 128 tokens are marked, as many as the rule allows.
                staged.squares.fill_(torch.inf)
                staged.squares[::64] = 0
            results = codec.encode_staged(staged)
        else:
            results = codec.encode_staged(codec.stage(stores))
        blobs: list[Blob] = []
        for result in results:
            if isinstance(result, Exception):
                raise result
            blobs.append(result)
        return blobs

    def _loaded(
        self,
        codec: PagedCodec | PagedRawCodec,
        chunks: Iterable[int],
        blobs: Iterable[Blob],
        first_block: int,
    ) -> None:
        loads = [
            (Load(chunk * CHUNK, self._own(chunk)[first_block:], first_block), blob)
            for chunk, blob in zip(chunks, blobs, strict=True)
        ]
        for error in codec.load(loads, CHUNK):
            if error is not None:
                raise error

    def _own(self, chunk: int) -> list[int]:
        first = chunk % self._chunks * self._blocks
        return list(range(first, first + self._blocks))


@contextlib.contextmanager
def waves_of(chunks: int) -> Iterator[None]:
    """Loads are cut as in an engine with memory for so many chunks at a time."""
    names = vars(paged_reader)
    most = names["LARGEST_WAVE"]
    names["LARGEST_WAVE"] = chunks * CHUNK
    try:
        yield
    finally:
        names["LARGEST_WAVE"] = most


def copy_units(units: int) -> None:
    """The launch by which `NvcompDeflate` moves units."""
    table = torch.zeros(3, units, dtype=torch.int64)
    copy_ranges(table[0], table[1], table[2])
