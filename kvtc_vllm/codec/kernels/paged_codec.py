"""The fast path: batches of chunks between the paged cache and blobs.

    codec = PagedKvtcCodec(artifact, 16.0, cache, block_size=16, identity=identity)
    staged = codec.stage(stores)                              # on the compute stream
    blobs = codec.encode_staged(staged)                       # on a side stream
    errors = codec.load(list(zip(loads, blobs)), chunk_tokens)

`stores` are of `StoreChunk`, `loads` of `LoadChunk`.

Blobs are those of the codec by torch operations: each reads the other's. Integer codes
are the same for the same coefficients; coefficients differ by the order of summation and by the
operand precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch

from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.container import NewSection, build_header, header_with
from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.codec.frame import NON_FINITE
from kvtc_vllm.codec.kernels.bit_payloads import BitPayloads
from kvtc_vllm.codec.kernels.blob_writer import BlobPlan, WrittenBlobs, write_blobs
from kvtc_vllm.codec.kernels.chunks import (
    RowLayout,
    StoreChunk,
)
from kvtc_vllm.codec.kernels.deflate_nvcomp import host_threads
from kvtc_vllm.codec.kernels.encoder import EncodedStep, StagedChunks, encode_rows
from kvtc_vllm.codec.kernels.paged import (
    chunk_slots,
)
from kvtc_vllm.codec.kernels.paged_io import gather_rows
from kvtc_vllm.codec.kernels.paged_norms import squared_norms
from kvtc_vllm.codec.kernels.paged_reader import HOST_BYTES, PagedReader
from kvtc_vllm.codec.kernels.payload_coding import (
    NO_MARKS,
    CodedSizes,
    Marks,
    PayloadCoding,
    count_marked,
)
from kvtc_vllm.codec.kernels.step_payloads import StepPlanPayloads
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.streams import upload
from kvtc_vllm.codec.v2.codec import Kvtc2Codec

_HEADS = 64
"""Kinds of chunks whose headers are remembered, by numbers of tokens, sinks and sections."""


@dataclass(frozen=True)
class ExactParts:
    """What a blob has before its coded sections. sinks: None if it has none. marks: bool [N]."""

    sinks: Future[NewSection] | None
    marks: Marks


class PagedCodec(PagedReader):
    """A transform codec that works on batches, straight from and to one paged cache.

    Made as `PagedReader` is. workspace_bytes bounds what encoding takes, too.
    """

    @cached_property
    def _headers(self) -> Callable[[int, int, int], bytes]:
        return lru_cache(_HEADS)(self._header_of)

    def staging_bytes(self, tokens: int) -> int:
        """Device memory that `stage` takes for `tokens` tokens, sinks apart."""
        row = self.geometry.token_elements() * self._operand.itemsize
        return tokens * (row + len(self._rule_layers) * self._rule_layers.itemsize)

    def stage(self, chunks: Sequence[StoreChunk]) -> StagedChunks:
        """Read chunks out of the paged cache: few kernels on the current stream, no waiting.

        To be called on the stream that writes the cache. Another stream may encode after an
        event recorded here; the allocator must then be told (`record_stream`) of
        `StagedChunks.tensors`.
        """
        tokens = tuple(len(chunk.block_ids) * self.block_size for chunk in chunks)
        refused = {
            index: f"positions up to {chunk.start + length - 1} are outside the RoPE table"
            for index, (chunk, length) in enumerate(zip(chunks, tokens, strict=True))
            if chunk.start + length > self._max_position
        }
        sinks = tuple(
            0 if index in refused else self._sinks(chunk.start, tokens[index])
            for index, chunk in enumerate(chunks)
        )
        layout = RowLayout.of(
            [0 if i in refused else tokens[i] - sinks[i] for i in range(len(chunks))]
        )
        longest = max(tokens, default=0)
        slots = chunk_slots(
            [chunk.block_ids for chunk in chunks], [0] * len(chunks), self.block_size, longest
        )
        place = np.arange(longest)
        positions = np.array([chunk.start for chunk in chunks], np.int64)[:, None] + place
        # A chunk with sinks has its coded tokens behind them, one that is refused has none.
        exact = place < np.array(sinks, np.int64)[:, None]
        wanted = (place < np.array(tokens, np.int64)[:, None]) & ~exact
        wanted[list(refused)] = False
        coded_slots = upload(torch.from_numpy(slots[wanted]), self.device)
        rows = self._gather(coded_slots, torch.from_numpy(positions[wanted]))
        sink_rows = self._gather_exact(torch.from_numpy(slots[exact]))
        squares = self._squares(coded_slots)
        return StagedChunks(tuple(chunks), tokens, sinks, layout, rows, sink_rows, squares, refused)

    def encode_staged(self, staged: StagedChunks) -> list[Blob | CodecError]:
        """Encode on the current stream: a blob for each chunk, or why there is none.

        Waits for the device.
        """
        ends = list(accumulate(staged.sinks, initial=0))
        exact = staged.sink_rows.to(self.dtype).cpu()
        sound = staged.sink_rows.isfinite().all(dim=1).cpu().numpy()
        results: dict[int, Blob | CodecError] = {
            index: CodecError("position", why) for index, why in staged.refused.items()
        }
        # Another thread codes them while the device works on the rest.
        sinks = {
            index: self._begin_sinks(exact, ends[index], ends[index + 1])
            for index in range(len(staged.chunks))
            if index not in results
        }
        for index, future in sinks.items():
            if future is not None and not sound[ends[index] : ends[index + 1]].all():
                results[index] = CodecError("non_finite", NON_FINITE)
        marks = self.marks_of(staged)
        exact_parts = {
            index: ExactParts(future, marks.get(index, NO_MARKS)) for index, future in sinks.items()
        }
        # Chunks that consist of sinks only are in no step.
        for index in sinks.keys() - set(staged.layout.members) - results.keys():
            (results[index],) = self._blobs(staged, [index], exact_parts, None).result()
        limits = self.workspace_bytes, HOST_BYTES
        members: Sequence[int] = ()
        blobs = WrittenBlobs([])
        try:
            for step in encode_rows(staged, marks, self.coding, self._units, *limits):
                # Written while the device worked on this step.
                results = dict(zip(members, blobs.result(), strict=True)) | results
                members, blobs = step.members, self._blobs(staged, step.members, exact_parts, step)
        finally:
            written = blobs.result()
        results = dict(zip(members, written, strict=True)) | results
        return [results[index] for index in range(len(staged.chunks))]

    def marks_of(self, staged: StagedChunks) -> dict[int, Marks]:
        """The marked tokens of each chunk that has coded ones; empty if blobs do not say."""
        layout = staged.layout
        if staged.squares is None or self.artifact.sink_rule is None:
            return dict.fromkeys(layout.members, NO_MARKS)
        rule = self.artifact.sink_rule
        measure = rule.measure_of(staged.squares.sqrt()).cpu()
        found = rule.marked_in(measure, layout.tokens)
        return {i: marks.numpy() for i, marks in zip(layout.members, found, strict=True)}

    def _squares(self, slots: torch.Tensor) -> torch.Tensor | None:
        """What the sink rule looks at, of coded tokens; None if there is none."""
        if not len(self._rule_layers):
            return None
        squares = torch.empty((len(slots), len(self._rule_layers)), device=self.device)
        squared_norms(self.cache.v, slots, self._rule_layers, squares)
        return squares

    def _gather(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rows of coded tokens in the operand dtype. slots: on the device."""
        shape = len(slots), self.resident.row
        rows = torch.empty(shape, dtype=self._operand, device=self.device)
        positions = upload(positions, self.device)
        gather_rows(self.rows, slots, positions, self.resident.mean, rows)
        return rows

    def _gather_exact(self, slots: torch.Tensor) -> torch.Tensor:
        """Cache rows as they are, without scales, float32."""
        slots = upload(slots, self.device)
        rows = torch.empty((len(slots), self.resident.row), device=self.device)
        gather_rows(self.exact_rows, slots, slots, None, rows)
        return rows

    def _begin_sinks(self, exact: torch.Tensor, first: int, end: int) -> Future[NewSection] | None:
        """The section of one chunk's sinks; None if it has none."""
        if first == end:
            return None
        k, v = torch.split(exact[first:end], self._exact_parts, dim=1)
        return host_threads().submit(self._sink_section, k, v)

    def _blobs(
        self,
        staged: StagedChunks,
        members: Sequence[int],
        exact: Mapping[int, ExactParts],
        step: EncodedStep | None,
    ) -> WrittenBlobs:
        """Put the coded units of chunks together with what goes before them."""
        sizes = None if step is None else self._sizes(staged, members, exact, step)
        doubtful = np.ones(len(members), np.bool_) if sizes is None else self.coding.doubtful(sizes)
        plans: list[BlobPlan | CodecError] = []
        for place, (index, doubt) in enumerate(zip(members, doubtful.tolist(), strict=True)):
            try:
                if sizes is not None and doubt:
                    self.coding.check(sizes, place)
                plans.append(self._plan(staged, index, exact[index], step, place))
            except CodecError as error:
                plans.append(error)
        body = None if step is None else step.body
        return write_blobs(plans, body, self._own.mine, self.device)

    @staticmethod
    def _sizes(
        staged: StagedChunks,
        members: Sequence[int],
        exact: Mapping[int, ExactParts],
        step: EncodedStep,
    ) -> CodedSizes:
        coded = [staged.tokens[index] - staged.sinks[index] for index in members]
        marked = count_marked([exact[index].marks for index in members])
        counts = np.array(coded, np.int64), marked
        return CodedSizes(np.array(step.magnitudes), step.sizes, *counts)

    def _plan(
        self,
        staged: StagedChunks,
        index: int,
        parts: ExactParts,
        step: EncodedStep | None,
        place: int,
    ) -> BlobPlan:
        """Of chunk `index`, the step's at `place`."""
        chunk = staged.chunks[index]
        exact = [] if parts.sinks is None else [parts.sinks.result()]
        if len(parts.marks):
            exact.append(self._marks_section(torch.from_numpy(parts.marks)))
        coded = 0 if step is None else step.sizes.shape[1]
        common = self._headers(staged.tokens[index], staged.sinks[index], len(exact) + coded)
        header = header_with(common, chunk.start, self._bound_identity(chunk.key))
        if step is None:
            return BlobPlan.of(header, exact, b"", b"", (0, 0))
        first = step.ends[place - 1] if place else 0
        tables = step.section_rows[place], step.unit_tables[place]
        return BlobPlan.of(header, exact, *tables, (first, step.ends[place]))

    def _header_of(self, tokens: int, sinks: int, sections: int) -> bytes:
        """A header of chunks that have so many in common, see `header_with`."""
        return build_header(self._common_header(tokens, sinks), sections)


class PagedKvtcCodec(PagedCodec, KvtcCodec):
    """`KvtcCodec` in batches."""

    def _open_coding(self, artifact: RankArtifact) -> PayloadCoding:
        return BitPayloads(artifact, self.ratio, self.device, self._operand)


class PagedKvtc2Codec(PagedCodec, Kvtc2Codec):
    """`Kvtc2Codec` in batches."""

    def _open_coding(self, artifact: RankArtifact) -> PayloadCoding:
        return StepPlanPayloads(artifact, self.ratio, self.device, self._operand)


PAGED_CODECS: dict[str, type[PagedCodec]] = {
    codec.name: codec for codec in (PagedKvtcCodec, PagedKvtc2Codec)
}
"""By the name of the codec whose blobs they read and write."""
