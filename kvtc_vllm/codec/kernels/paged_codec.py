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
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.artifact import KINDS, Kind, RankArtifact, at_ratio
from kvtc_vllm.codec.base import Blob, read_section
from kvtc_vllm.codec.container import NO_FINGERPRINT, ContainerInfo, Header, Section
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.frame import NON_FINITE, SECTION_KIND
from kvtc_vllm.codec.kernels import decoder, encoder
from kvtc_vllm.codec.kernels.blob_writer import BlobPlan, write_blobs
from kvtc_vllm.codec.kernels.chunks import LoadChunk, RowLayout, StoreChunk, shares, steps
from kvtc_vllm.codec.kernels.decoder import DecodeStep, DecodeWorkspace
from kvtc_vllm.codec.kernels.deflate_nvcomp import host_threads
from kvtc_vllm.codec.kernels.encoder import EncodedStep, StagedChunks, encode_rows
from kvtc_vllm.codec.kernels.numeric import OPERAND, Precision
from kvtc_vllm.codec.kernels.paged import (
    PagedCache,
    check_geometry,
    chunk_slots,
    rotations,
)
from kvtc_vllm.codec.kernels.paged_io import gather_rows, scatter_rows
from kvtc_vllm.codec.kernels.resident import ResidentArtifact
from kvtc_vllm.codec.kernels.unit_coders import UnitCoder, unit_coder
from kvtc_vllm.codec.kernels.uploads import UploadedBlobs
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.quantizers.base import FP16_MAX
from kvtc_vllm.codec.streams import DeviceThreads, Event, upload
from kvtc_vllm.codec.transform import magnitude

HOST_BYTES = 64 << 20
"""Pinned memory of every thread that encodes or loads. A step's compressed bytes fit into it."""
_CODED: dict[int, Kind] = {section: tensor for tensor, section in SECTION_KIND.items()}


class PagedKvtcCodec(KvtcCodec):
    """`KvtcCodec` that also works on batches, straight from and to one paged cache.

    Only what the given ratio needs is resident: blobs of other ratios of the artifact are
    refused. cache: of the artifact's geometry, fp8 elements viewed as such, without scales: those
    are the artifact's (`self.cache` has them). block_size: tokens per scheduler block. precision:
    of the operands of matrix products. workspace_bytes: device memory that every thread that
    encodes or loads may take beside the resident artifact and the staged rows; work is cut to
    fit. coder: None for the best that works on the device. Raises ValueError if the cache is of
    another geometry, and what `TransformCodec` raises.
    """

    def __init__(
        self,
        artifact: RankArtifact,
        ratio: float,
        cache: PagedCache,
        block_size: int,
        identity: bytes = NO_FINGERPRINT,
        precision: Precision = "float16",
        workspace_bytes: int = 1 << 30,
        coder: UnitCoder | None = None,
    ) -> None:
        device = cache.k.device
        if ratio in artifact.ratios():  # else the constructor below says that it is not
            artifact = at_ratio(artifact, ratio)
        # Its own bases stay on the host: kernels read those of `ResidentArtifact`.
        super().__init__(artifact, ratio, cache.k.dtype, identity, operand=torch.float16)
        self.device = device
        geometry = artifact.geometry
        check_geometry(cache, geometry)
        self.cache = cache.scaled(artifact.scales)
        self._exact = cache
        self.block_size = block_size
        self._operand = OPERAND[precision]
        # The operands' precision is more than enough for what ends in 16 bits or fewer.
        narrow = precision == "float16" and cache.k.dtype.itemsize <= 2
        self.row_dtype = torch.float16 if narrow else torch.float32
        self.workspace_bytes = workspace_bytes
        self.resident = ResidentArtifact(artifact, ratio, device, self._operand)
        self._units = unit_coder(device) if coder is None else coder
        self._own = DeviceThreads(device, HOST_BYTES)
        self._unrotated = rotations([None] * geometry.num_layers, device)

    @property
    def resident_bytes(self) -> int:
        return self.resident.nbytes

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
        results: dict[int, Blob | CodecError] = {
            index: CodecError("position", why) for index, why in staged.refused.items()
        }
        sinks = {
            index: self._sink_rows(exact, ends[index], ends[index + 1])
            for index in range(len(staged.chunks))
            if index not in results
        }
        # Chunks that consist of sinks only are in no step.
        for index in sinks.keys() - set(staged.layout.members):
            (results[index],) = self._blobs(staged, [index], sinks, None)
        for step in encode_rows(staged, self.resident, self._units, self._encode_limit):
            blobs = self._blobs(staged, step.members, sinks, step)
            results.update(zip(step.members, blobs, strict=True))
        return [results[index] for index in range(len(staged.chunks))]

    def load(
        self,
        chunks: Sequence[tuple[LoadChunk, Blob]],
        tokens: int,
        point: Event | None = None,
    ) -> list[ContainerError | None]:
        """Verify and decode chunks of `tokens` tokens into their blocks, on the current stream.

        point: on another stream, before which the blocks may be in use; only the writing into
        them waits for it. Gives for every chunk None, or the error for which its blocks must be
        recomputed: they may have been written. Waits for the device. Raises
        torch.OutOfMemoryError before it has written any block of the chunks that did not fit
        together; work on those before may still run on the current stream, and on no other.
        """
        errors: list[ContainerError | None] = [None] * len(chunks)
        per_token = decoder.workspace_bytes_per_token(self.resident, self.row_dtype)
        weights = [
            # Twice: by device memory, and by the share of the pinned memory.
            max(per_token * tokens, self.workspace_bytes * len(blob) // HOST_BYTES)
            for _, blob in chunks
        ]
        for step in steps(weights, self.workspace_bytes):
            found = self._load_step(chunks[step], tokens, point)
            for place, error in found.items():
                errors[step.start + place] = error
        return errors

    def _load_step(
        self, chunks: Sequence[tuple[LoadChunk, Blob]], tokens: int, point: Event | None
    ) -> dict[int, ContainerError]:
        """Decode chunks that fit the workspace together; errors by place."""
        thread = self._own.mine
        blobs = [memoryview(blob) for _, blob in chunks]
        uploads = UploadedBlobs(blobs, thread, self.device, self._units.reads_on_device)
        infos: dict[int, ContainerInfo] = {}
        failed: dict[int, ContainerError] = {}
        for place, info in enumerate(self._verify(chunks, tokens, uploads)):
            if isinstance(info, ContainerError):
                failed[place] = info
            else:
                infos[place] = info
                if self._units.reads_on_device:
                    uploads.send(place)
        slots = chunk_slots(
            [chunk.block_ids for chunk, _ in chunks],
            [chunk.first_block for chunk, _ in chunks],
            self.block_size,
            tokens,
        )
        # Needed last, so another thread has time for them.
        reading = host_threads().submit(self._read_sinks, infos, blobs, slots)
        sinks_of = [
            infos[place].header.sinks if place in infos else tokens for place in range(len(chunks))
        ]
        layout = RowLayout.of([tokens - count for count in sinks_of])
        coded = np.arange(tokens) >= np.array(sinks_of, np.int64)[:, None]
        starts = np.array([chunk.start for chunk, _ in chunks], np.int64)
        positions = starts[:, None] + np.arange(tokens)
        step = DecodeStep(
            layout,
            [_coded_sections(infos[i]) if i in infos else {} for i in range(len(chunks))],
            upload(torch.from_numpy(slots[coded]), self.device),
            upload(torch.from_numpy(positions[coded]), self.device),
        )
        if layout.members:
            workspace = DecodeWorkspace.of(step, self.resident, self.row_dtype)
            reader = self._units.open(uploads, infos)
            failed |= decoder.decode_step(
                step, reader, self.resident, self.cache, workspace, thread.stream, point
            )
        # Last: all that follows on this stream would wait for the point, too.
        sinks, sink_slots, damaged = reading.result()
        failed |= damaged
        if len(sink_slots):
            if point is not None:
                point.wait()
            self._write_sinks(sinks, sink_slots)
        if layout.members:
            failed = decoder.damaged_chunks(step, workspace) | failed
        return failed

    def _verify(
        self, chunks: Sequence[tuple[LoadChunk, Blob]], tokens: int, uploads: UploadedBlobs
    ) -> Iterator[ContainerInfo | ContainerError]:
        """Check all on the host's threads, and stage for the upload what is sound; in order."""

        def verify(place: int) -> ContainerInfo | ContainerError:
            chunk, blob = chunks[place]
            try:
                info = self._verified(blob, chunk.start, tokens, chunk.key)
            except ContainerError as error:
                return error
            if self._units.reads_on_device:
                uploads.stage(place)
            return info

        parts = shares(len(chunks))
        for found in host_threads().map(lambda places: [*map(verify, places)], parts):
            yield from found

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

    def _read_sinks(
        self,
        infos: dict[int, ContainerInfo],
        blobs: Sequence[memoryview],
        slots: npt.NDArray[np.int64],
    ) -> tuple[dict[Kind, torch.Tensor], torch.Tensor, dict[int, ContainerError]]:
        """Sinks of all chunks, cache dtype [S, p], and their slots [S], on the host.

        Those of damaged sections are left out, and told by place.
        """
        failed: dict[int, ContainerError] = {}
        parts: dict[Kind, list[torch.Tensor]] = {tensor: [] for tensor in KINDS}
        own_slots: list[torch.Tensor] = []
        for place, info in infos.items():
            if not info.header.sinks:
                continue
            try:
                payload = read_section(info.sections[0], blobs[place])
            except ContainerError as error:
                failed[place] = error
                continue
            sinks = self._decode_sinks(payload, info.header.sinks, torch.device("cpu"))
            for tensor, values in zip(KINDS, sinks, strict=True):
                parts[tensor].append(values.flatten(1))
            own_slots.append(torch.from_numpy(slots[place, : info.header.sinks]))
        if not own_slots:
            return {}, torch.empty(0, dtype=torch.int64), failed
        together = {tensor: torch.cat(values) for tensor, values in parts.items()}
        return together, torch.cat(own_slots), failed

    def _write_sinks(self, sinks: dict[Kind, torch.Tensor], slots: torch.Tensor) -> None:
        slots = upload(slots, self.device)
        for tensor, values in sinks.items():
            rows = upload(values, self.device).float()
            exact = self._exact.tensor(tensor)
            scatter_rows(exact, slots, slots, self._unrotated, None, rows)

    def _sink_rows(
        self, exact: dict[Kind, torch.Tensor], first: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """K and V of one chunk's sinks; None if it has none."""
        return None if first == end else (exact["k"][first:end], exact["v"][first:end])

    def _blobs(
        self,
        staged: StagedChunks,
        members: Sequence[int],
        sinks: dict[int, tuple[torch.Tensor, torch.Tensor] | None],
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
        sinks: tuple[torch.Tensor, torch.Tensor] | None,
        step: EncodedStep | None,
        place: int,
    ) -> BlobPlan:
        exact = []
        if sinks is not None:
            if not all(magnitude(x) < math.inf for x in sinks):
                raise CodecError("non_finite", NON_FINITE)
            exact.append(self._sink_section(*sinks))
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


def _coded_sections(info: ContainerInfo) -> dict[tuple[int, Kind], tuple[int, Section]]:
    return {
        (section.group, _CODED[section.kind]): (number, section)
        for number, section in enumerate(info.sections)
        if section.kind in _CODED
    }
