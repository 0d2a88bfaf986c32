"""The reading half of the fast path: batches of blobs -> paged cache.

A load is cut into waves of chunks: while the device works on one, the host verifies the next.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from functools import lru_cache, partial
from itertools import accumulate, islice

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.artifact import RankArtifact, at_ratio
from kvtc_vllm.codec.base import Blob, read_section
from kvtc_vllm.codec.container import NO_FINGERPRINT, Header
from kvtc_vllm.codec.entropy import aligned
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.kernels import decoder
from kvtc_vllm.codec.kernels.chunks import LoadChunk, RowLayout, shares, waves
from kvtc_vllm.codec.kernels.decoder import Decoder, DecodeStep, DecodeWorkspace
from kvtc_vllm.codec.kernels.deflate_nvcomp import host_threads
from kvtc_vllm.codec.kernels.load_parts import BegunPart, LoadPart, load_parts, that_fit
from kvtc_vllm.codec.kernels.numeric import OPERAND, Precision
from kvtc_vllm.codec.kernels.paged import PagedCache, check_geometry, chunk_slots
from kvtc_vllm.codec.kernels.paged_io import scatter_rows
from kvtc_vllm.codec.kernels.payload_coding import PayloadCoding, PayloadPlan, StoredPayloads
from kvtc_vllm.codec.kernels.resident import layer_places
from kvtc_vllm.codec.kernels.row_table import RowTable
from kvtc_vllm.codec.kernels.unit_coders import UnitCoder, unit_coder
from kvtc_vllm.codec.kernels.uploads import UploadedBlobs
from kvtc_vllm.codec.kernels.verified import ExpectedHead, VerifiedBlob, has_checksum
from kvtc_vllm.codec.streams import DeviceThreads, Event, upload

HOST_BYTES = 128 << 20
"""Pinned memory of every thread that encodes or loads. A step's compressed bytes fit into it, and
so do two parts of a load: one is checked while the device works on the other."""
FIRST_WAVE, LARGEST_WAVE = 4096, 4096
"""Tokens of a load that are decoded together: of the first ones, and the most. On an H100, smaller
waves cost more launches than they hide: the host takes some 4 ms for each."""
_HEADS = 16
"""Kinds of chunks, by numbers of tokens and sinks, whose heads are remembered."""


class PagedReader(TransformCodec):
    """A transform codec that also loads batches straight into one paged cache.

    To be mixed into the codec, whose payloads `_open_coding` knows.

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
        self.block_size = block_size
        self._operand = OPERAND[precision]
        # The operands' precision is more than enough for what ends in 16 bits or fewer.
        narrow = precision == "float16" and cache.k.dtype.itemsize <= 2
        self.row_dtype = torch.float16 if narrow else torch.float32
        self.workspace_bytes = workspace_bytes
        self.coding = self._open_coding(artifact)
        self.resident = self.coding.resident
        self._units = unit_coder(device, self._entropy) if coder is None else coder
        self._own = DeviceThreads(device, HOST_BYTES)
        rule = self.artifact.sink_rule if self._has_marks else None
        layers = () if rule is None else rule.layers
        self._rule_layers = torch.tensor(layers, dtype=torch.int32, device=device)
        places = layer_places(artifact, self.resident.columns)
        self.rows = RowTable.of(self.cache, places, self.resident.row)
        self.exact_rows = RowTable.exact(cache, self.resident.row)
        self._exact_parts = [
            own.num_layers * own.layer_elements for own in (self.cache.k, self.cache.v)
        ]
        self._expected_head = lru_cache(_HEADS)(self._head_of)

    @abstractmethod
    def _open_coding(self, artifact: RankArtifact) -> PayloadCoding:
        """The payloads of the artifact's sections at the codec's ratio, on its device."""

    @property
    def resident_bytes(self) -> int:
        return self.resident.nbytes + self.rows.nbytes

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
        most = min(HOST_BYTES, self.workspace_bytes // 2)
        parts = load_parts([aligned(len(blob)) for _, blob in chunks], most)
        begun: deque[BegunPart] = deque()
        try:
            for number, part in enumerate(parts):
                # The next is checked meanwhile.
                for coming in parts[number + len(begun) : number + 2]:
                    begun.append(self._begin_part(chunks, coming))
                free = self.workspace_bytes - sum(x.uploads.on_device.numel() for x in begun)
                found = self._load_part(chunks[part.places], begun[0], tokens, point, free)
                for place, error in found.items():
                    errors[part.places.start + place] = error
                begun.popleft()
        finally:
            # What is begun writes into memory of this thread that the next load uses again.
            wait([task for one in begun for task in one.tasks])
        return errors

    def _begin_part(self, chunks: Sequence[tuple[LoadChunk, Blob]], part: LoadPart) -> BegunPart:
        """Have the host's threads check its blobs and stage them for the way to the device."""
        blobs = [memoryview(blob) for _, blob in chunks[part.places]]
        to_device = self._units.reads_on_device
        uploads = UploadedBlobs(blobs, self._own.mine, self.device, to_device, part.host)
        return BegunPart(uploads, self._begin_checksums(uploads))

    def _load_part(
        self,
        chunks: Sequence[tuple[LoadChunk, Blob]],
        own: BegunPart,
        tokens: int,
        point: Event | None,
        free: int,
    ) -> dict[int, ContainerError]:
        """Decode chunks whose blobs fit the pinned memory together; errors by place.

        free: bytes of device memory, at most.
        """
        thread, uploads = self._own.mine, own.uploads
        fitting = decoder.chunks_that_fit(self.coding, self.row_dtype, tokens, free)
        most = max(1, min(LARGEST_WAVE // tokens, fitting))
        # As many waves, and none much smaller than the others.
        most = -(-len(chunks) // -(-len(chunks) // most))
        parts = waves(len(chunks), max(1, FIRST_WAVE // tokens), most)
        largest = max(part.stop - part.start for part in parts)
        workspace = DecodeWorkspace.of(
            self.coding, self.row_dtype, len(chunks), largest, tokens, self.device
        )
        decoding = Decoder(self.coding, self.rows, workspace, thread.stream, point)
        begin = Event(self.device)
        slots = chunk_slots(
            [chunk.block_ids for chunk, _ in chunks],
            [chunk.first_block for chunk, _ in chunks],
            self.block_size,
            tokens,
        )
        starts = np.array([chunk.start for chunk, _ in chunks], np.int64)
        # While the host's threads look at the checksums.
        matched = self._matched(chunks, tokens)
        sound = (right for task in own.tasks for right in task.result())
        verified: dict[int, VerifiedBlob] = {}
        stored: dict[int, StoredPayloads] = {}
        failed: dict[int, ContainerError] = {}
        room = largest, tokens
        limits = self.coding.payload_room(*room), self.coding.marked_room(*room)
        try:
            for wave in parts:
                count = wave.stop - wave.start
                own_sound = list(islice(sound, count))
                sent_as = [
                    (chunk, uploads.sent(place))
                    for place, (chunk, _) in enumerate(chunks[wave], wave.start)
                ]
                checked = self._check(sent_as, tokens, matched[wave], own_sound)
                right: dict[int, VerifiedBlob] = {}
                for place, found in enumerate(checked, wave.start):
                    if isinstance(found, ContainerError):
                        failed[place] = found
                    else:
                        right[place] = found
                held, bad = self._stored(right, tokens)
                stored |= held
                failed |= bad
                verified |= {place: right[place] for place in right if place not in bad}
                if wave is parts[-1]:
                    # Needed last, so another thread has time for them.
                    reading = host_threads().submit(self._read_sinks, verified, slots)
                for part in that_fit(wave, stored, limits):
                    here = {i: verified[i] for i in range(part.start, part.stop) if i in verified}
                    members = tuple(i for i in here if i in stored)
                    if not members:
                        continue
                    sent = None
                    if self._units.reads_on_device:
                        with thread.copying.after(begin):
                            uploads.send(part)
                            sent = Event(self.device)
                    layout = RowLayout(members, tuple(tokens - here[i].sinks for i in members))
                    plan = self.coding.plan(layout, [stored[i] for i in members])
                    open_reader = partial(self._units.open, uploads, here)
                    inflated, damaged = decoding.inflate(plan, open_reader, sent)
                    failed |= damaged
                    # Tables of the step are made while the device inflates.
                    decoding.decode(self._step(layout, plan, starts, tokens, slots), inflated)
            sinks, sink_slots, damaged = reading.result()
            failed |= damaged
            # Last: all that follows on this stream would wait for the point, too.
            if sinks is not None:
                if point is not None:
                    point.wait()
                slots_there = upload(sink_slots, self.device)
                exact = upload(sinks, self.device).float()
                scatter_rows(self.exact_rows, slots_there, slots_there, None, exact)
            return decoding.damaged() | failed
        except BaseException:
            # What is begun writes into memory of this thread that the next load uses again.
            thread.copying.synchronize()
            thread.stream.synchronize()
            raise

    def _stored(
        self, blobs: Mapping[int, VerifiedBlob], tokens: int
    ) -> tuple[dict[int, StoredPayloads], dict[int, ContainerError]]:
        """Of blobs by place: their payloads, if they have coded tokens, or what is wrong."""
        places = [place for place, blob in blobs.items() if blob.sinks < tokens]
        own = [blobs[place] for place in places]
        held: dict[int, StoredPayloads] = {}
        bad: dict[int, ContainerError] = {}
        looked = self.coding.stored_in(own, [tokens - blob.sinks for blob in own])
        for place, found in zip(places, looked, strict=True):
            if isinstance(found, ContainerError):
                bad[place] = found
            else:
                held[place] = found
        return held, bad

    def _begin_checksums(self, uploads: UploadedBlobs) -> list[Future[list[bool]]]:
        """Whether each blob's is right, in order; on the host's threads, which stage them.

        Here they do nothing for which they would wait for each other.
        """
        to_device = self._units.reads_on_device

        def check(places: Sequence[int]) -> list[bool]:
            return [
                has_checksum(uploads.stage(place) if to_device else uploads.views[place])
                for place in places
            ]

        return [host_threads().submit(check, places) for places in shares(len(uploads.views))]

    def _matched(
        self, chunks: Sequence[tuple[LoadChunk, Blob]], tokens: int
    ) -> list[VerifiedBlob | None]:
        """What each blob holds if its head is as we write that of its chunk. None: who knows."""
        alike: dict[int, list[int]] = {}
        for place, (chunk, _) in enumerate(chunks):
            if chunk.start + tokens <= self._max_position:
                alike.setdefault(self._sinks(chunk.start, tokens), []).append(place)
        found: list[VerifiedBlob | None] = [None] * len(chunks)
        for sinks, places in alike.items():
            own = [chunks[place] for place in places]
            names = [(chunk.start, self._bound_identity(chunk.key)) for chunk, _ in own]
            matched = self._expected_head(tokens, sinks).match([blob for _, blob in own], names)
            for place, blob in zip(places, matched, strict=True):
                found[place] = blob
        return found

    def _check(
        self,
        chunks: Sequence[tuple[LoadChunk, Blob]],
        tokens: int,
        matched: Sequence[VerifiedBlob | None],
        sound: Sequence[bool],
    ) -> list[VerifiedBlob | ContainerError]:
        """What each blob holds, or why it is not that of its chunk, at any ratio.

        chunks: with each blob as it is sent. matched: of `_matched`. sound: whether each has its
        checksum.
        """
        return [
            known if right and known is not None else self._look_closely(chunk, blob, tokens)
            for (chunk, blob), known, right in zip(chunks, matched, sound, strict=True)
        ]

    def _look_closely(
        self, chunk: LoadChunk, blob: Blob, tokens: int
    ) -> VerifiedBlob | ContainerError:
        try:
            return VerifiedBlob.of(blob, self._verified(blob, chunk.start, tokens, chunk.key))
        except ContainerError as error:
            return error

    def _common_header(self, tokens: int, sinks: int) -> Header:
        """Of chunks that have so many in common, see `container.header_with`."""
        return self._new_header(tokens, 0, sinks, self.ratio, self.artifact.fingerprint, b"")

    def _head_of(self, tokens: int, sinks: int) -> ExpectedHead:
        sections = self._sections_of(tokens, sinks, self.ratio)
        return ExpectedHead.of(sections, self._common_header(tokens, sinks))

    def _step(
        self,
        layout: RowLayout,
        plan: PayloadPlan,
        starts: npt.NDArray[np.int64],
        tokens: int,
        slots: npt.NDArray[np.int64],
    ) -> DecodeStep:
        """What kernels read of a step. starts, slots: of all chunks of the load, by place."""
        members = np.array(layout.members, np.int64)
        # Sinks come first.
        coded = np.arange(tokens) >= tokens - np.array(layout.tokens, np.int64)[:, None]
        table = layout.table.numpy()
        rows, numbers = layout.num_rows, plan.numbers
        # One upload: each costs as much as a launch. What begins a table begins 16 bytes.
        sizes = [rows, rows, table.size, len(numbers)]
        ends = list(accumulate(size + size % 2 for size in sizes))
        places = [
            slice(end - size - size % 2, end - size % 2)
            for end, size in zip(ends, sizes, strict=True)
        ]
        on_host = np.zeros(ends[-1], np.int64)
        whole = len(members) * tokens == rows
        on_host[places[0]] = slots[members].ravel() if whole else slots[members][coded]
        positions = starts[members, None] + np.arange(tokens)
        on_host[places[1]] = positions.ravel() if whole else positions[coded]
        on_host[places[2]] = table.ravel()
        on_host[places[3]] = numbers
        there = upload(torch.from_numpy(on_host), self.device)
        own_slots, own_positions, own_table, own_numbers = (there[place] for place in places)
        return DecodeStep(layout, own_table.view(-1, 3), own_slots, own_positions, own_numbers)

    def _read_sinks(
        self, verified: Mapping[int, VerifiedBlob], slots: npt.NDArray[np.int64]
    ) -> tuple[torch.Tensor | None, torch.Tensor, dict[int, ContainerError]]:
        """Sinks of all chunks, cache dtype [S, P], and their slots [S], on the host.

        K of all layers comes before V. None if there are none. Those of damaged sections are left
        out, and told by place.
        """
        failed: dict[int, ContainerError] = {}
        parts: list[torch.Tensor] = []
        own_slots: list[torch.Tensor] = []
        for place, blob in verified.items():
            if not blob.sinks:
                continue
            try:
                payload = read_section(blob.section(0), blob.view)
            except ContainerError as error:
                failed[place] = error
                continue
            sinks = self._decode_sinks(payload, blob.sinks, torch.device("cpu"))
            parts.append(torch.cat([values.flatten(1) for values in sinks], dim=1))
            own_slots.append(torch.from_numpy(slots[place, : blob.sinks]))
        if not own_slots:
            return None, torch.empty(0, dtype=torch.int64), failed
        return torch.cat(parts), torch.cat(own_slots), failed
