"""The codec `raw` in batches: pages <-> blobs by one launch, whatever the number of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from kvtc_vllm.codec.artifact import KINDS, Geometry, Kind
from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.container import (
    ALL_LAYERS,
    NO_FINGERPRINT,
    SectionEntry,
    SectionKind,
    build_head,
)
from kvtc_vllm.codec.entropy import RAW, UNIT_ALIGNMENT
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.kernels.blob_writer import BlobPlan, write_blobs
from kvtc_vllm.codec.kernels.chunks import LoadChunk, StoreChunk, steps
from kvtc_vllm.codec.kernels.deflate_nvcomp import host_threads
from kvtc_vllm.codec.kernels.jit import jit
from kvtc_vllm.codec.kernels.paged import (
    PagedCache,
    PagedTensor,
    check_geometry,
    chunk_slots,
)
from kvtc_vllm.codec.kernels.paged_io import token_page
from kvtc_vllm.codec.kernels.row_table import compiled_for
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.codec.streams import DeviceThreads, Event, upload

HOST_BYTES = 64 << 20
"""Pinned memory of every thread that encodes or loads: some megabytes of KV at a time."""
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_SECTION_KIND: dict[Kind, SectionKind] = {"k": SectionKind.EXACT_K, "v": SectionKind.EXACT_V}


@dataclass(frozen=True)
class StagedPages:
    """Chunks read out of the paged cache; their blocks may be overwritten now."""

    chunks: tuple[StoreChunk, ...]
    tokens: tuple[int, ...]
    """Of each chunk."""
    data: torch.Tensor
    """uint8 on the device, of chunk after chunk: K [T, L, H, D], then V [T, L, H, Dv]."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the allocator must be told about when another stream encodes."""
        return [self.data]


class PagedRawCodec(RawCodec):
    """`RawCodec` that also works on batches, straight from and to one paged cache.

    Blobs are the same. cache, block_size: as for `PagedKvtcCodec`. workspace_bytes: device memory
    that every thread that loads may take. Raises ValueError if the cache is of another geometry,
    or if a block of K is not whole units of the container.
    """

    def __init__(
        self,
        geometry: Geometry,
        cache: PagedCache,
        block_size: int,
        identity: bytes = NO_FINGERPRINT,
        workspace_bytes: int = 1 << 30,
    ) -> None:
        device = cache.k.device
        super().__init__(geometry, cache.k.dtype, identity, device)
        check_geometry(cache, geometry)
        self.block_size = block_size
        self.workspace_bytes = workspace_bytes
        self._layers = _AlikePages.of(PagedCache(_words(cache.k), _words(cache.v)))
        self._own = DeviceThreads(device, HOST_BYTES)
        self._token_bytes: dict[Kind, int] = {
            tensor: geometry.num_layers * cache.tensor(tensor).layer_elements * self.dtype.itemsize
            for tensor in KINDS
        }
        odd = [size for size in self._token_bytes.values() if block_size * size % UNIT_ALIGNMENT]
        if odd:
            raise ValueError(f"{block_size} tokens of {odd[0]} bytes are no whole units")

    @property
    def resident_bytes(self) -> int:
        """Device memory that is taken all the time."""
        return 0

    def staging_bytes(self, tokens: int) -> int:
        """Device memory that `stage` takes for `tokens` tokens."""
        return tokens * sum(self._token_bytes.values())

    def stage(self, chunks: Sequence[StoreChunk]) -> StagedPages:
        """Read chunks of equal length out of the paged cache: one kernel on the current stream.

        Does not wait.
        """
        tokens = tuple(len(chunk.block_ids) * self.block_size for chunk in chunks)
        data = torch.empty(self.staging_bytes(sum(tokens)), dtype=torch.uint8, device=self.device)
        if chunks:
            ids = [chunk.block_ids for chunk in chunks]
            slots = chunk_slots(ids, [0] * len(chunks), self.block_size, tokens[0])
            self._move(data, slots, write=False)
        return StagedPages(tuple(chunks), tokens, data)

    def encode_staged(self, staged: StagedPages) -> list[Blob | CodecError]:
        """A blob for each chunk. Waits for the device."""
        results: list[Blob | CodecError] = []
        sizes = [self.staging_bytes(tokens) for tokens in staged.tokens]
        first = 0
        for part in steps(sizes, HOST_BYTES):
            plans: list[BlobPlan | CodecError] = []
            done = 0
            for chunk, tokens, size in zip(
                staged.chunks[part], staged.tokens[part], sizes[part], strict=True
            ):
                plans.append(self._plan(chunk, tokens, (done, done + size)))
                done += size
            body = staged.data[first : first + done]
            results += write_blobs(plans, body, self._own.mine, self.device).result()
            first += done
        return results

    def load(
        self,
        chunks: Sequence[tuple[LoadChunk, Blob]],
        tokens: int,
        point: Event | None = None,
    ) -> list[ContainerError | None]:
        """Verify and copy chunks of `tokens` tokens into their blocks, on the current stream.

        point, result, errors: as of `PagedKvtcCodec.load`.
        """
        errors: list[ContainerError | None] = []
        limit = min(HOST_BYTES, self.workspace_bytes)
        for part in steps([self.staging_bytes(tokens)] * len(chunks), limit):
            errors += self._load_step(chunks[part], tokens, point)
        return errors

    def _load_step(
        self, chunks: Sequence[tuple[LoadChunk, Blob]], tokens: int, point: Event | None
    ) -> list[ContainerError | None]:
        size = self.staging_bytes(tokens)
        host = self._own.mine.host(len(chunks) * size)
        data = torch.empty(len(chunks) * size, dtype=torch.uint8, device=self.device)
        staged = host.numpy()

        def verify(place: int) -> ContainerError | None:
            chunk, blob = chunks[place]
            try:
                info = self._verified(blob, chunk.start, tokens, chunk.key)
            except ContainerError as error:
                return error
            # K and V lie side by side: neither needs padding, see the constructor.
            body = np.frombuffer(blob, np.uint8)[info.sections[0].offset :][:size]
            np.copyto(staged[place * size : (place + 1) * size], body)
            return None

        errors: list[ContainerError | None] = []
        sound: list[LoadChunk] = []
        for place, error in enumerate(host_threads().map(verify, range(len(chunks)))):
            errors.append(error)
            if error is None:
                target = data[len(sound) * size :][:size]
                target.copy_(host[place * size :][:size], non_blocking=True)
                sound.append(chunks[place][0])
        if sound:
            if point is not None:
                point.wait()
            ids = [chunk.block_ids for chunk in sound]
            first = [chunk.first_block for chunk in sound]
            slots = chunk_slots(ids, first, self.block_size, tokens)
            self._move(data[: len(sound) * size], slots, write=True)
        # The pinned memory is the next step's.
        Event(self.device).synchronize()
        return errors

    def _plan(self, chunk: StoreChunk, tokens: int, body: tuple[int, int]) -> BlobPlan | CodecError:
        header = self._new_header(tokens, chunk.start, 0, 0.0, NO_FINGERPRINT, chunk.key)
        sizes = [tokens * self._token_bytes[tensor] for tensor in KINDS]
        entries = [
            SectionEntry(_SECTION_KIND[tensor], RAW.coder_id, ALL_LAYERS, 0, size, size)
            for tensor, size in zip(KINDS, sizes, strict=True)
        ]
        try:
            return BlobPlan(build_head(header, entries), body)
        except CodecError as error:
            return error

    def _move(self, data: torch.Tensor, slots: npt.NDArray[np.int64], write: bool) -> None:
        """Between the cache and `StagedPages.data`; slots: [chunks, tokens]."""
        table = upload(torch.from_numpy(slots), self.device)
        per_chunk = data.view(len(slots), -1).view(_WORDS[self.dtype.itemsize])
        move_rows(self._layers, table, per_chunk, write)


def _words(tensor: PagedTensor) -> PagedTensor:
    """The same memory as integers: no kernel then makes another NaN of a NaN."""
    return PagedTensor.of([view.view(_WORDS[view.dtype.itemsize]) for view in tensor.views])


@dataclass(frozen=True)
class _AlikePages:
    """Layers of K and V that one launch covers.

    like: one of them. alignment: of all, in bytes. table: int64 [n, 4] on the device: address of
    the layer, elements of a token that lie before its tensor in a chunk, elements before the layer
    in a token of its tensor, and elements of such a token.
    """

    like: PagedTensor
    alignment: int
    table: torch.Tensor

    @classmethod
    def of(cls, cache: PagedCache) -> list[_AlikePages]:
        """K and V together if they are alike, else one after the other."""
        rows: list[list[tuple[int, int, int, int]]] = []
        before = 0
        for own in (cache.k, cache.v):
            size, token = own.layer_elements, own.num_layers * own.layer_elements
            rows.append(
                [
                    (view.data_ptr(), before, layer * size, token)
                    for layer, view in enumerate(own.views)
                ]
            )
            before += token
        if compiled_for(cache.k) == compiled_for(cache.v):
            return [cls._of(cache.k, rows[0] + rows[1])]
        return [cls._of(own, table) for own, table in zip((cache.k, cache.v), rows, strict=True)]

    @classmethod
    def _of(cls, like: PagedTensor, rows: list[tuple[int, int, int, int]]) -> _AlikePages:
        alignment = math.gcd(16, *(address for address, *_ in rows))
        return cls(like, alignment, torch.tensor(rows, dtype=torch.int64).to(like.device))


def move_rows(
    layers: Sequence[_AlikePages], slots: torch.Tensor, data: torch.Tensor, write: bool
) -> None:
    """Copy tokens of all layers between the cache and `data`, bit for bit.

    layers: of int8, int16 or int32. slots: int64 [chunks, T] on their device, `SKIP` for tokens
    that are not wanted. data: of the same type, [chunks, T * (K and V of a token)], columns
    contiguous: K [T, L, H, D], then V. write: into the cache.
    """
    chunks, tokens = slots.shape
    for part in layers:
        like = part.like
        _move_kernel[(chunks * tokens, len(part.table))](
            part.table,
            *like.strides,
            slots,
            data,
            data.stride(0),
            tokens,
            like.page_tokens,
            TYPE=_TYPES[like.dtype],
            HEADS=like.num_heads,
            HEAD_SIZE=like.head_size,
            ALIGNMENT=part.alignment,
            COLUMN_ALIGNMENT=math.gcd(16, like.layer_elements),
            HEAD_TILE=triton.next_power_of_2(like.num_heads),
            SIZE_TILE=triton.next_power_of_2(like.head_size),
            WRITE=write,
        )


_TYPES = {torch.int8: tl.int8, torch.int16: tl.int16, torch.int32: tl.int32}


@jit(do_not_specialize=("tokens", "page_tokens"))
def _move_kernel(  # type: ignore[no-untyped-def]
    table,
    page_stride,
    head_stride,
    token_stride,
    dim_stride,
    slots,
    data,
    chunk_stride,
    tokens,
    page_tokens,
    TYPE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    COLUMN_ALIGNMENT: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    SIZE_TILE: tl.constexpr,
    WRITE: tl.constexpr,
):
    """One program: one token of one layer."""
    row = tl.program_id(0)
    layer = table + tl.program_id(1) * 4
    slot = tl.load(slots + row)
    if slot >= 0:
        address = tl.load(layer)
        page = token_page(address, slot, page_tokens, page_stride, token_stride, TYPE, ALIGNMENT)
        head = tl.arange(0, HEAD_TILE)[:, None]
        dim = tl.arange(0, SIZE_TILE)[None, :]
        inside = (head < HEADS) & (dim < HEAD_SIZE)
        cached = page + head.to(tl.int64) * head_stride + dim * dim_stride
        chunk = (row // tokens).to(tl.int64)
        token = (row % tokens).to(tl.int64)
        first = tl.load(layer + 1) * tokens + token * tl.load(layer + 3) + tl.load(layer + 2)
        staged = data + chunk * chunk_stride + tl.multiple_of(first, COLUMN_ALIGNMENT)
        staged += head * HEAD_SIZE + dim
        if WRITE:
            tl.store(cached, tl.load(staged, mask=inside, other=0), mask=inside)
        else:
            tl.store(staged, tl.load(cached, mask=inside, other=0), mask=inside)
