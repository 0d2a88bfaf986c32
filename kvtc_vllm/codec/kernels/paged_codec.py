"""The fast path: batches of chunks between the paged cache and blobs.

    codec = PagedKvtcCodec(artifact, 16.0, cache, block_size=16, identity=identity)
    staged = codec.stage(stores)                              # on the compute stream
    blobs = codec.encode_staged(staged)                       # on a side stream
    errors = codec.load(list(zip(loads, blobs)), chunk_tokens)

`stores` are of `StoreChunk`, `loads` of `LoadChunk`.

Blobs are those of `KvtcCodec`: each reads the other's. Integer codes are the same for the same
coefficients; coefficients differ by the order of summation and by the operand precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import accumulate

import numpy as np
import torch

from kvtc_vllm.codec.artifact import Kind
from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.container import Header, NewSection
from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.codec.frame import NON_FINITE
from kvtc_vllm.codec.kernels import encoder
from kvtc_vllm.codec.kernels.blob_writer import BlobPlan, write_blobs
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
from kvtc_vllm.codec.kernels.paged_reader import HOST_BYTES, PagedKvtcReader
from kvtc_vllm.codec.quantizers.base import FP16_MAX
from kvtc_vllm.codec.streams import upload


class PagedKvtcCodec(PagedKvtcReader):
    """`KvtcCodec` that works on batches, straight from and to one paged cache.

    Made as `PagedKvtcReader` is. workspace_bytes bounds what encoding takes, too.
    """

    def staging_bytes(self, tokens: int) -> int:
        """Device memory that `stage` takes for `tokens` tokens, sinks apart."""
        return tokens * self.geometry.token_elements() * self._operand.itemsize

    def stage(self, chunks: Sequence[StoreChunk]) -> StagedChunks:
        """Read chunks out of the paged cache: two kernels on the current stream, no waiting.

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
        rows = self._gather(torch.from_numpy(slots[wanted]), torch.from_numpy(positions[wanted]))
        sink_rows = self._gather_exact(torch.from_numpy(slots[exact]))
        return StagedChunks(tuple(chunks), tokens, sinks, layout, rows, sink_rows, refused)

    def encode_staged(self, staged: StagedChunks) -> list[Blob | CodecError]:
        """Encode on the current stream: a blob for each chunk, or why there is none.

        Waits for the device.
        """
        ends = list(accumulate(staged.sinks, initial=0))
        exact = {tensor: x.to(self.dtype).cpu() for tensor, x in staged.sink_rows.items()}
        finite = torch.stack([x.isfinite().all(dim=1) for x in staged.sink_rows.values()])
        sound = finite.all(dim=0).cpu().numpy()
        results: dict[int, Blob | CodecError] = {
            index: CodecError("position", why) for index, why in staged.refused.items()
        }
        # Another thread codes them while the device works on the rest.
        sinks = {
            index: self._begin_sinks(exact, ends[index], ends[index + 1])
            for index in range(len(staged.chunks))
            if index not in results
        }
        for index in sinks:
            if not sound[ends[index] : ends[index + 1]].all():
                results[index] = CodecError("non_finite", NON_FINITE)
        # Chunks that consist of sinks only are in no step.
        for index in sinks.keys() - set(staged.layout.members) - results.keys():
            (results[index],) = self._blobs(staged, [index], sinks, None)
        for step in encode_rows(staged, self.resident, self._units, self._encode_limit):
            blobs = self._blobs(staged, step.members, sinks, step)
            results = dict(zip(step.members, blobs, strict=True)) | results
        return [results[index] for index in range(len(staged.chunks))]

    @property
    def _encode_limit(self) -> int:
        """Workspace of a step whose stored bytes fit the pinned memory."""
        payload = sum(plan.raw_length(8) for plan in self.resident.plans.values()) // 8
        per_token = encoder.workspace_bytes_per_token(self.resident)
        return min(self.workspace_bytes, HOST_BYTES // max(payload, 1) * per_token)

    def _gather(self, slots: torch.Tensor, positions: torch.Tensor) -> dict[Kind, torch.Tensor]:
        """Rows of coded tokens in the operand dtype."""
        slots, positions = upload(slots, self.device), upload(positions, self.device)
        rows: dict[Kind, torch.Tensor] = {}
        for tensor, mean in self.resident.means.items():
            rows[tensor] = mean.new_empty((len(slots), len(mean)), dtype=self._operand)
            spans = self.resident.rotations[tensor]
            gather_rows(self.cache.tensor(tensor), slots, positions, spans, mean, rows[tensor])
        return rows

    def _gather_exact(self, slots: torch.Tensor) -> dict[Kind, torch.Tensor]:
        """Cache rows as they are, without scales, float32."""
        slots = upload(slots, self.device)
        rows: dict[Kind, torch.Tensor] = {}
        for tensor, mean in self.resident.means.items():
            rows[tensor] = mean.new_empty((len(slots), len(mean)))
            exact = self._exact.tensor(tensor)
            gather_rows(exact, slots, slots, self._unrotated, None, rows[tensor])
        return rows

    def _begin_sinks(
        self, exact: dict[Kind, torch.Tensor], first: int, end: int
    ) -> Future[NewSection] | None:
        """The section of one chunk's sinks; None if it has none."""
        if first == end:
            return None
        return host_threads().submit(
            self._sink_section, exact["k"][first:end], exact["v"][first:end]
        )

    def _blobs(
        self,
        staged: StagedChunks,
        members: Sequence[int],
        sinks: dict[int, Future[NewSection] | None],
        step: EncodedStep | None,
    ) -> list[Blob | CodecError]:
        """Put the coded units of chunks together with what goes before them."""
        plans: list[BlobPlan | CodecError] = []
        for place, index in enumerate(members):
            chunk = staged.chunks[index]
            header = self._new_header(
                staged.tokens[index],
                chunk.start,
                staged.sinks[index],
                self.ratio,
                self.artifact.fingerprint,
                chunk.key,
            )
            try:
                if step is not None:
                    _check_magnitude(step.magnitudes[place])
                plans.append(self._plan(header, sinks[index], step, place))
            except CodecError as error:
                plans.append(error)
        body = None if step is None else step.body
        return write_blobs(plans, body, self._own.mine, self.device)

    def _plan(
        self,
        header: Header,
        sinks: Future[NewSection] | None,
        step: EncodedStep | None,
        place: int,
    ) -> BlobPlan:
        exact = [] if sinks is None else [sinks.result()]
        if step is None:
            return BlobPlan.of(header, exact, 0, b"", b"", (0, 0))
        first = step.ends[place - 1] if place else 0
        return BlobPlan.of(
            header,
            exact,
            len(self._section_keys()),
            step.section_rows[place],
            step.unit_tables[place],
            (first, step.ends[place]),
        )


def _check_magnitude(magnitude: float) -> None:
    if not magnitude < math.inf:
        raise CodecError("non_finite", NON_FINITE)
    if magnitude > FP16_MAX:
        raise CodecError("range", "a coefficient is outside the float16 range")
