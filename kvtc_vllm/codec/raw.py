"""raw: K and V as they are, inside the same container. The yardstick and the fallback."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch

from kvtc_vllm.codec.base import (
    ChunkCodec,
    DecodedGroup,
    ExpectedSection,
    read_section,
)
from kvtc_vllm.codec.container import (
    ALL_LAYERS,
    NO_FINGERPRINT,
    ContainerInfo,
    Header,
    NewSection,
    SectionKind,
    build,
    container_bytes,
)
from kvtc_vllm.codec.entropy import (
    RAW,
    UNIT_ALIGNMENT,
    UNIT_BYTES,
    DeflateCoder,
    EntropyCoder,
    aligned,
)
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.shuffle import to_bytes

_SMALL_UNIT = 8192


def max_raw_blob_bytes(chunk_bytes: int) -> int:
    """Upper bound in bytes of a raw blob of a chunk whose K and V take `chunk_bytes` together."""
    return container_bytes([aligned(chunk_bytes), UNIT_ALIGNMENT])


class RawCodec(ChunkCodec):
    """Bit-exact storage: one section with K [T, L, H, D], one with V [T, L, H, Dv].

    NaN and infinities are kept. Layer groups are the geometry's.
    """

    codec_id: ClassVar[int] = 0
    name: ClassVar[str] = "raw"
    _coder: ClassVar[EntropyCoder] = RAW

    def encode(self, k: torch.Tensor, v: torch.Tensor, start: int, key: bytes = b"") -> bytes:
        self._check_tensors(k, v, start)
        header = self._new_header(
            k.shape[0], start, sinks=0, ratio=0.0, artifact=NO_FINGERPRINT, key=key
        )
        sections = [
            NewSection(
                kind, self._coder.coder_id, ALL_LAYERS, len(data), self._coder.encode([data])
            )
            for kind, data in (
                (SectionKind.EXACT_K, to_bytes(k)),
                (SectionKind.EXACT_V, to_bytes(v)),
            )
        ]
        return build(header, sections)

    def max_blob_bytes(self, tokens: int) -> int:
        elements = tokens * self.geometry.num_layers * self.geometry.num_kv_heads
        sizes = (self.geometry.head_size, self.geometry.head_size_v)
        return container_bytes([aligned(elements * n * self.dtype.itemsize) for n in sizes])

    def _check_header(self, header: Header) -> None:
        if header.artifact != NO_FINGERPRINT:
            raise ContainerError("fingerprint", "a raw blob names no artifact")
        if header.sinks or header.ratio != 0.0:
            raise ContainerError("geometry", "a raw blob has no sinks and no ratio")

    def _expected_sections(self, header: Header) -> list[ExpectedSection]:
        elements = header.tokens * header.num_layers * header.num_kv_heads * self.dtype.itemsize
        return [
            ExpectedSection(SectionKind.EXACT_K, ALL_LAYERS, elements * header.head_size),
            ExpectedSection(SectionKind.EXACT_V, ALL_LAYERS, elements * header.head_size_v),
        ]

    def _groups(self, info: ContainerInfo, blob: memoryview) -> Iterator[DecodedGroup]:
        k, v = (self._tensor(info, i, blob) for i in range(2))
        for first, end in self.geometry.layer_groups:
            yield DecodedGroup(first, end, k[:, first:end], v[:, first:end])

    def _tensor(self, info: ContainerInfo, index: int, blob: memoryview) -> torch.Tensor:
        data = torch.frombuffer(read_section(info.sections[index], blob), dtype=self.dtype)
        shape = (info.header.tokens, self.geometry.num_layers, self.geometry.num_kv_heads, -1)
        return data.view(shape).to(self.device)


class DeflatedRawCodec(RawCodec):
    """Writes raw blobs whose sections are DEFLATE units; reads what `RawCodec` does.

    For bytes that someone has put in an order in which they compress, with other statistics from
    stretch to stretch: a Huffman table for each small unit, and no search for matches.
    """

    _coder: ClassVar[EntropyCoder] = DeflateCoder(matches=False, unit_bytes=_SMALL_UNIT)

    def max_blob_bytes(self, tokens: int) -> int:
        elements = tokens * self.geometry.num_layers * self.geometry.num_kv_heads
        sizes = (self.geometry.head_size, self.geometry.head_size_v)
        return container_bytes(
            [_most_of_small_units(elements * n * self.dtype.itemsize) for n in sizes]
        )


def _most_of_small_units(size: int) -> int:
    """Most bytes that a payload of `size` takes as units of about `_SMALL_UNIT`, with their table.

    Units may be up to half as large again, or two thirds as large.
    """
    units = 1 + math.ceil(1.5 * size / _SMALL_UNIT)
    return size + units * (UNIT_BYTES + UNIT_ALIGNMENT)
