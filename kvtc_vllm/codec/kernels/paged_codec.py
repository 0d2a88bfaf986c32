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
from itertools import accumulate

import torch

from kvtc_vllm.codec.artifact import KINDS, Kind, RankArtifact
from kvtc_vllm.codec.base import Blob, read_section
from kvtc_vllm.codec.container import NO_FINGERPRINT, ContainerInfo, NewSection, Section, build
from kvtc_vllm.codec.entropy import DEFLATE, unit_lengths
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.frame import NON_FINITE, SECTION_KIND
from kvtc_vllm.codec.kernels.chunks import (
    LoadChunk,
    StoreChunk,
    batches_of,
    in_row_order,
    steps,
)
from kvtc_vllm.codec.kernels.decoder import (
    DecodeStep,
    DecodeWorkspace,
    decode_step,
    workspace_bytes_per_token,
)
from kvtc_vllm.codec.kernels.deflate_nvcomp import host_threads
from kvtc_vllm.codec.kernels.encoder import CodedChunk, StagedChunks, encode_rows
from kvtc_vllm.codec.kernels.numeric import OPERAND, Precision
from kvtc_vllm.codec.kernels.paged import PagedCache, block_slots, rotations
from kvtc_vllm.codec.kernels.paged_io import SKIP, gather_rows, scatter_rows
from kvtc_vllm.codec.kernels.resident import ResidentArtifact
from kvtc_vllm.codec.kernels.unit_coders import UnitCoder, unit_coder
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.quantizers.base import FP16_MAX
from kvtc_vllm.codec.streams import Event, PerThread, upload

_CODED: dict[int, Kind] = {section: tensor for tensor, section in SECTION_KIND.items()}


class PagedKvtcCodec(KvtcCodec):
    """`KvtcCodec` that also works on batches, straight from and to one paged cache.

    cache: of the artifact's geometry, fp8 elements viewed as such, without scales: those are the
    artifact's (`self.cache` has them). block_size: tokens per scheduler block. precision: of the
    operands of matrix products. workspace_bytes: device memory that one step of encoding or
    decoding may take beside the resident artifact and the staged rows; work is cut to fit. coder:
    None for the best that works on the device. Raises ValueError if the cache is of another
    geometry, and what `TransformCodec` raises.
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
        operand, device = OPERAND[precision], cache.k.device
        super().__init__(artifact, ratio, cache.k.dtype, identity, device=device, operand=operand)
        geometry = artifact.geometry
        found = (cache.k.num_layers, cache.k.num_heads, cache.k.head_size, cache.v.head_size)
        wanted = (
            geometry.num_layers,
            geometry.num_kv_heads,
            geometry.head_size,
            geometry.head_size_v,
        )
        if found != wanted:
            raise ValueError(f"the cache is {found} (layers, heads, sizes), the artifact {wanted}")
        self.cache = cache.scaled(artifact.scales)
        self._exact = cache
        self.block_size = block_size
        self._operand = operand
        self.workspace_bytes = workspace_bytes
        self.resident = ResidentArtifact(artifact, self._sections, self.device)
        self._units = unit_coder(self.device) if coder is None else coder
        self._inflating = PerThread(self.device)
        self._unrotated = rotations([None] * geometry.num_layers, self.device)

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
        coded = [0 if i in refused else tokens[i] - sinks[i] for i in range(len(chunks))]
        batches = batches_of(coded)
        slots = [block_slots(chunk.block_ids, self.block_size) for chunk in chunks]
        rows = self._gather(
            in_row_order(batches, lambda i: slots[i][sinks[i] :]),
            in_row_order(batches, lambda i: chunks[i].start + torch.arange(sinks[i], tokens[i])),
        )
        sink_slots = [own[:count] for own, count in zip(slots, sinks, strict=True)]
        sink_rows = self._gather_exact(torch.cat([torch.empty(0, dtype=torch.int64), *sink_slots]))
        return StagedChunks(tuple(chunks), tokens, sinks, batches, rows, sink_rows, refused)

    def encode_staged(self, staged: StagedChunks) -> list[bytes | CodecError]:
        """Encode on the current stream: a blob for each chunk, or why there is none.

        Waits for the device.
        """
        coded = encode_rows(staged, self.resident, self.ratio, self._units, self.workspace_bytes)
        sink_ends = list(accumulate(staged.sinks))
        exact = {tensor: staged.sink_rows[tensor].cpu() for tensor in KINDS}
        results: list[bytes | CodecError] = []
        for index, end in enumerate(sink_ends):
            sinks = {tensor: exact[tensor][end - staged.sinks[index] : end] for tensor in KINDS}
            try:
                results.append(self._blob(staged, index, coded.get(index), sinks))
            except CodecError as error:
                results.append(error)
        return results

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
        torch.OutOfMemoryError, then with nothing launched of what did not fit; work before it
        may still run on the current stream, and on no other.
        """
        errors: list[ContainerError | None] = [None] * len(chunks)
        infos = list(host_threads().map(lambda c: self._verify(c[0], c[1], tokens), chunks))
        good: list[tuple[int, ContainerInfo]] = []
        for index, info in enumerate(infos):
            if isinstance(info, ContainerError):
                errors[index] = info
            else:
                good.append((index, info))
        for ratio in sorted({info.header.ratio for _, info in good}):
            alike = [(index, info) for index, info in good if info.header.ratio == ratio]
            per_token = workspace_bytes_per_token(self.resident, ratio)
            weights = [per_token * info.header.tokens for _, info in alike]
            for step in steps(weights, self.workspace_bytes):
                for index, error in self._load_step(chunks, alike[step], ratio, point).items():
                    errors[index] = error
        return errors

    def _load_step(
        self,
        chunks: Sequence[tuple[LoadChunk, Blob]],
        members: Sequence[tuple[int, ContainerInfo]],
        ratio: float,
        point: Event | None,
    ) -> dict[int, ContainerError]:
        """Decode chunks that fit the workspace together; errors by the chunk's number."""
        blobs = [memoryview(chunks[index][1]) for index, _ in members]
        headers = [info.header for _, info in members]
        slots = [
            self._wanted_slots(chunks[index][0], header.tokens)
            for (index, _), header in zip(members, headers, strict=True)
        ]
        batches = batches_of([header.tokens - header.sinks for header in headers])
        failed: dict[int, ContainerError] = {}
        sinks, sink_slots = self._read_sinks(members, blobs, slots, failed)
        step = DecodeStep(
            ratio,
            batches,
            [_coded_sections(info) for _, info in members],
            upload(in_row_order(batches, lambda i: slots[i][headers[i].sinks :]), self.device),
            upload(
                in_row_order(
                    batches,
                    lambda i: headers[i].start + torch.arange(headers[i].sinks, headers[i].tokens),
                ),
                self.device,
            ),
        )
        workspace = DecodeWorkspace.of(step, self.resident)
        reader = self._units.open(blobs)
        damaged, flags = decode_step(
            step, reader, self.resident, self.cache, workspace, self._inflating.stream, point
        )
        # Last: all that follows on this stream would wait for the point, too.
        if len(sink_slots):
            if point is not None:
                point.wait()
            self._write_sinks(sinks, sink_slots)
        for batch, flag in flags:
            for place, not_finite in enumerate(flag.tolist()):
                if not_finite:
                    damaged.setdefault(
                        batch.members[place],
                        ContainerError("bounds", "a decoded coefficient is not finite"),
                    )
        return {members[place][0]: wrong for place, wrong in damaged.items()} | failed

    def _verify(self, chunk: LoadChunk, blob: Blob, tokens: int) -> ContainerInfo | ContainerError:
        try:
            return self._verified(blob, chunk.start, tokens, chunk.key)
        except ContainerError as error:
            return error

    def _wanted_slots(self, chunk: LoadChunk, tokens: int) -> torch.Tensor:
        """A slot per token, int64 [tokens], `SKIP` for those in blocks that are not wanted."""
        slots = torch.full((tokens,), SKIP, dtype=torch.int64)
        first = chunk.first_block * self.block_size
        wanted = block_slots(chunk.block_ids, self.block_size)
        slots[first : first + len(wanted)] = wanted
        return slots

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
        members: Sequence[tuple[int, ContainerInfo]],
        blobs: Sequence[memoryview],
        slots: Sequence[torch.Tensor],
        failed: dict[int, ContainerError],
    ) -> tuple[dict[Kind, torch.Tensor], torch.Tensor]:
        """Sinks of all chunks, cache dtype [S, p], and their slots [S], on the device.

        Those of damaged sections are left out, their errors put into `failed`.
        """
        parts: dict[Kind, list[torch.Tensor]] = {tensor: [] for tensor in KINDS}
        own_slots: list[torch.Tensor] = []
        for (index, info), blob, own in zip(members, blobs, slots, strict=True):
            if not info.header.sinks:
                continue
            try:
                payload = read_section(info.sections[0], blob)
            except ContainerError as error:
                failed[index] = error
                continue
            sinks = self._decode_sinks(payload, info.header.sinks, torch.device("cpu"))
            for tensor, values in zip(KINDS, sinks, strict=True):
                parts[tensor].append(values.flatten(1))
            own_slots.append(own[: info.header.sinks])
        if not own_slots:
            return {}, torch.empty(0, dtype=torch.int64)
        together = {tensor: torch.cat(values) for tensor, values in parts.items()}
        return (
            {tensor: upload(values, self.device) for tensor, values in together.items()},
            upload(torch.cat(own_slots), self.device),
        )

    def _write_sinks(self, sinks: dict[Kind, torch.Tensor], slots: torch.Tensor) -> None:
        for tensor, values in sinks.items():
            exact = self._exact.tensor(tensor)
            scatter_rows(exact, slots, slots, self._unrotated, None, values.float())

    def _blob(
        self,
        staged: StagedChunks,
        index: int,
        coded: CodedChunk | None,
        sinks: dict[Kind, torch.Tensor],
    ) -> bytes:
        if index in staged.refused:
            raise CodecError("position", staged.refused[index])
        chunk, count = staged.chunks[index], staged.sinks[index]
        sections: list[NewSection] = []
        if count:
            if not all(bool(x.isfinite().all()) for x in sinks.values()):
                raise CodecError("non_finite", NON_FINITE)
            k, v = (sinks[tensor].to(self.dtype) for tensor in KINDS)
            sections.append(self._sink_section(k, v))
        if coded is not None:
            if not coded.magnitude < math.inf:
                raise CodecError("non_finite", NON_FINITE)
            if coded.magnitude > FP16_MAX:
                raise CodecError("range", "a coefficient is outside the float16 range")
            for (layer_group, tensor), encoded in zip(
                self._section_keys(), coded.sections, strict=True
            ):
                kind = SECTION_KIND[tensor]
                raw_length = int(unit_lengths(encoded.units)[:, 0].sum())
                sections.append(
                    NewSection(kind, DEFLATE.coder_id, layer_group, raw_length, encoded)
                )
        header = self._new_header(
            staged.tokens[index],
            chunk.start,
            count,
            self.ratio,
            self.artifact.fingerprint,
            chunk.key,
        )
        return build(header, sections)


def _coded_sections(info: ContainerInfo) -> dict[tuple[int, Kind], Section]:
    return {(s.group, _CODED[s.kind]): s for s in info.sections if s.kind in _CODED}
