"""Transform codecs by compiled loops and, where plans allow it, int8 products. Imports numba."""

from __future__ import annotations

import contextlib
import logging
import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.artifact import RankArtifact, SectionBasis, SectionKey
from kvtc_vllm.codec.base import (
    Blob,
    DecodedChunk,
    DecodedGroup,
    NewChunk,
    StoredChunk,
    read_section,
)
from kvtc_vllm.codec.container import NO_FINGERPRINT, ContainerInfo, NewSection, build
from kvtc_vllm.codec.cpu.bit_section import BitSection
from kvtc_vllm.codec.cpu.cache_rows import CacheRows
from kvtc_vllm.codec.cpu.rows import Floats, Integers, largest_bits16
from kvtc_vllm.codec.cpu.section import FastSection
from kvtc_vllm.codec.cpu.step_section import StepSection
from kvtc_vllm.codec.cpu.stored import TileProducts
from kvtc_vllm.codec.cpu.tiles import Span, empty_chunk, tiles
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.frame import SECTION_KIND, TransformCodec
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.marks import BEYOND_KIND, no_beyond, unpack_marks
from kvtc_vllm.codec.transform import mean_chunk
from kvtc_vllm.codec.v2.codec import Kvtc2Codec
from kvtc_vllm.codec.v2.plan import step_plan

logger = logging.getLogger(__name__)

Marks = npt.NDArray[np.bool_]


class CpuCodec(TransformCodec):
    """The same blobs both ways as the codec that it is mixed into, but several times faster.

    Codes are those of the reference for the same coefficients. Coefficients, and what is decoded,
    are off by what `products` says. Compiles when it is made, for seconds if numba's cache is cold.
    Any number of threads may call it at once; it starts none of its own.

    int8: whether products are of int8 where a plan hides their rounding; None: where the CPU is
    fast at them and the matrix is large enough to gain.
    """

    batch: ClassVar[int] = 4

    def __init__(
        self,
        artifact: RankArtifact,
        ratio: float,
        dtype: torch.dtype,
        identity: bytes = NO_FINGERPRINT,
        deflate_level: int = 1,
        device: torch.device | str = "cpu",
        int8: bool | None = None,
    ) -> None:
        if torch.device(device).type != "cpu":
            raise ValueError(f"device is {device}; this codec runs on a cpu")
        # Bases as they are in the artifact: those that products take are made from them.
        super().__init__(artifact, ratio, dtype, identity, deflate_level, operand=torch.float16)
        self._int8 = int8
        self._lock = threading.Lock()
        self._fast: dict[float, dict[SectionKey, FastSection]] = {}
        self.cache_rows = CacheRows(artifact, dtype)
        logger.info("%s %gx on the CPU: %s", self.name, ratio, self.arithmetic)
        self._warm_up()

    @property
    def arithmetic(self) -> str:
        """How products are computed at the codec's ratio, in words."""
        found = {section.precision.value for section in self.sections(self.ratio).values()}
        return "compiled loops, products of " + " and ".join(sorted(found))

    @property
    def resident_bytes(self) -> int:
        fast = [s for sections in self._fast.values() for s in sections.values()]
        return super().resident_bytes + sum(section.nbytes for section in fast)

    def encode(self, k: torch.Tensor, v: torch.Tensor, start: int, key: bytes = b"") -> bytes:
        (result,) = self.encode_many([NewChunk(k, v, start, key)])
        if isinstance(result, CodecError):
            raise result
        return result

    def encode_many(self, chunks: Sequence[NewChunk]) -> list[bytes | CodecError]:
        for chunk in chunks:
            self._check_tensors(chunk.k, chunk.v, chunk.start)
        results: dict[int, bytes | CodecError] = {}
        sizes = [(i, chunk.k.shape[0]) for i, chunk in enumerate(chunks)]
        for tile in tiles(sizes):
            results |= self._encode_tile({i: chunks[i] for i in tile})
        return [results[i] for i in range(len(chunks))]

    def decode(
        self,
        blob: Blob,
        expect_start: int | None = None,
        expect_tokens: int | None = None,
        key: bytes = b"",
    ) -> DecodedChunk:
        (result,) = self.decode_many([StoredChunk(blob, expect_start, expect_tokens, key)])
        if isinstance(result, ContainerError):
            raise result
        return result

    def decode_many(self, chunks: Sequence[StoredChunk]) -> list[DecodedChunk | ContainerError]:
        results: dict[int, DecodedChunk | ContainerError] = {}
        verified: dict[int, ContainerInfo] = {}
        for i, chunk in enumerate(chunks):
            try:
                verified[i] = self._verified(chunk.blob, chunk.start, chunk.tokens, chunk.key)
            except ContainerError as error:
                results[i] = error
        for ratio in {info.header.ratio for info in verified.values()}:
            sizes = [(i, n.header.tokens) for i, n in verified.items() if n.header.ratio == ratio]
            for tile in tiles(sizes):
                blobs = {i: (verified[i], memoryview(chunks[i].blob)) for i in tile}
                results |= self._decode_tile(blobs, self.sections(ratio))
        return [results[i] for i in range(len(chunks))]

    def _groups(self, info: ContainerInfo, blob: memoryview) -> Iterator[DecodedGroup]:
        sections = self.sections(info.header.ratio)
        chunk = self._decode_tile({0: (info, blob)}, sections)[0]
        if isinstance(chunk, ContainerError):
            raise chunk
        for first, end in self.geometry.layer_groups:
            yield DecodedGroup(first, end, chunk.k[:, first:end], chunk.v[:, first:end])

    def _encode_tile(self, chunks: dict[int, NewChunk]) -> dict[int, bytes | CodecError]:
        results: dict[int, bytes | CodecError] = {}
        written: dict[int, list[NewSection]] = {}
        marks: dict[int, Marks] = {}
        for i, chunk in chunks.items():
            try:
                self._check_values(chunk.k, chunk.v, chunk.start)
            except CodecError as error:
                results[i] = error
                continue
            sinks = self._sinks(chunk.start, chunk.k.shape[0])
            exact = [self._sink_section(chunk.k[:sinks], chunk.v[:sinks])] if sinks else []
            written[i] = exact
            found = self._marks(chunk.v[sinks:]) if sinks < chunk.k.shape[0] else None
            if found is not None:
                exact.append(self._marks_section(found))
                marks[i] = found.numpy()
        spans = self._spans([(i, chunks[i].start, chunks[i].k.shape[0]) for i in written])
        for key, section in self.sections(self.ratio).items() if spans else ():
            group, name = key
            operand = section.forward.empty(spans[-1].rows.stop)
            for span in spans:
                own = operand.part(span.rows)
                self.cache_rows.take(chunks[span.number], span, key, section, own)
            products = TileProducts(section, operand, spans, marks)
            for span in spans:
                if span.number not in written:
                    continue
                try:
                    coded = products.stored(span, self._entropy)
                except CodecError as error:
                    results[span.number] = error
                    del written[span.number]
                    continue
                kinds = (SECTION_KIND[name], BEYOND_KIND[name])
                written[span.number] += [
                    NewSection(kind, part.coder_id, group, part.raw_length, part.encoded)
                    for kind, part in zip(kinds, coded, strict=False)
                ]
        for i, new in written.items():
            chunk = chunks[i]
            tokens = chunk.k.shape[0]
            sinks = self._sinks(chunk.start, tokens)
            header = self._new_header(
                tokens, chunk.start, sinks, self.ratio, self.artifact.fingerprint, chunk.key
            )
            results[i] = build(header, new)
        return results

    def _decode_tile(
        self,
        blobs: dict[int, tuple[ContainerInfo, memoryview]],
        sections: dict[SectionKey, FastSection],
    ) -> dict[int, DecodedChunk | ContainerError]:
        """Every payload of a blob is read before anything of it is decoded further."""
        results: dict[int, DecodedChunk | ContainerError] = {}
        headers = {i: info.header for i, (info, _) in blobs.items()}
        spans = self._spans([(i, h.start, h.tokens) for i, h in headers.items()])
        rows = spans[-1].rows.stop if spans else 0
        coefficients = {
            key: np.zeros((rows, section.live), np.float32) for key, section in sections.items()
        }
        row_of = {span.number: span.rows for span in spans}
        beyond: dict[SectionKey, list[tuple[Integers, Floats]]] = {k: [] for k in sections}
        for i, (info, blob) in blobs.items():
            try:
                results[i] = self._read(info, blob, sections, coefficients, beyond, row_of.get(i))
            except ContainerError as error:
                results[i] = error
        for key, section in sections.items() if spans else ():
            operand = section.inverse.operand(coefficients.pop(key))
            product = section.inverse.of(operand).numpy()
            if section.beyond is not None and beyond[key]:
                marked = np.concatenate([numbers for numbers, _ in beyond[key]])
                more = section.beyond.inverse.operand(np.concatenate([x for _, x in beyond[key]]))
                found = section.beyond.inverse.of(more).numpy() * more.factors[:, None]
                product[marked] += found / operand.factors[marked, None]
            for span in spans:
                chunk = results[span.number]
                if isinstance(chunk, DecodedChunk):
                    part, factors = product[span.rows], operand.factors[span.rows]
                    self.cache_rows.give(part, factors, span, key, section, chunk)
        return results

    def _read(
        self,
        info: ContainerInfo,
        blob: memoryview,
        sections: dict[SectionKey, FastSection],
        coefficients: dict[SectionKey, Floats],
        beyond: dict[SectionKey, list[tuple[Integers, Floats]]],
        rows: slice | None,
    ) -> DecodedChunk:
        """A chunk with its sinks and nothing else; its coefficients go to their rows.

        beyond: gets numbers of marked rows and the coefficients that they have beyond the rank.
        """
        header = info.header
        entries = iter(info.sections)
        chunk = empty_chunk(header, self.geometry, self.dtype)
        if header.sinks:
            payload = read_section(next(entries), blob)
            k, v = self._decode_sinks(payload, header.sinks)
            chunk.k[: header.sinks], chunk.v[: header.sinks] = k, v
        if rows is not None:
            marks = None
            if self._has_marks:
                bitmap = read_section(next(entries), blob)
                marks = unpack_marks(bitmap, header.tokens - header.sinks).numpy()
            for key, section in sections.items():
                payload = read_section(next(entries), blob)
                section.coefficients(payload, coefficients[key][rows])
                if marks is None:
                    continue
                gain = np.float32(section.sink_gain)
                coefficients[key][rows][marks] /= gain
                entry = next(entries)
                numbers = rows.start + np.flatnonzero(marks)
                if section.beyond is None or not len(numbers):
                    no_beyond(entry)
                    continue
                own = np.zeros((len(numbers), section.beyond.live), np.float32)
                section.beyond.coefficients(read_section(entry, blob), own)
                beyond[key].append((numbers, own / gain))
        return chunk

    def _spans(self, chunks: Sequence[tuple[int, int, int]]) -> list[Span]:
        """Where coded tokens of chunks (number, start, tokens) go in a tile."""
        found: list[Span] = []
        row = 0
        for number, start, tokens in chunks:
            first, end = start + self._sinks(start, tokens), start + tokens
            if first < end:
                found.append(Span(number, first, end, row))
                row += end - first
        return found

    def sections(self, ratio: float) -> dict[SectionKey, FastSection]:
        """At one of the artifact's ratios, as a blob has them. Made when first asked for."""
        with self._lock:
            if ratio not in self._fast:
                self._fast[ratio] = {
                    key: self._fast_section(self.artifact.sections[key], ratio, self._int8)
                    for key in self.artifact.section_keys()
                }
            return self._fast[ratio]

    @abstractmethod
    def _fast_section(
        self, section: SectionBasis, ratio: float, int8: bool | None
    ) -> FastSection: ...

    def _magnitude(self, x: torch.Tensor) -> float:
        if x.dtype not in (torch.bfloat16, torch.float16):
            return super()._magnitude(x)
        bits = largest_bits16(x.contiguous().view(torch.uint16).flatten().numpy())
        return float(torch.tensor(bits, dtype=torch.int16).view(x.dtype))

    def _warm_up(self) -> None:
        """Compile, and let oneDNN choose its kernels, before anything waits for it."""
        start = self.artifact.sink_tokens
        k, v = mean_chunk(self.artifact, self.dtype, start)
        # An artifact that can't code its mean says so when it is used.
        with contextlib.suppress(CodecError):
            self.decode(self.encode(k, v, start))


class CpuKvtcCodec(CpuCodec, KvtcCodec):
    """Version 1."""

    def _fast_section(self, section: SectionBasis, ratio: float, int8: bool | None) -> FastSection:
        return BitSection(section, ratio, int8)


class CpuKvtc2Codec(CpuCodec, Kvtc2Codec):
    """Version 2."""

    def _fast_section(self, section: SectionBasis, ratio: float, int8: bool | None) -> FastSection:
        return StepSection(section, step_plan(section, ratio), int8)
