"""The reading half of the fast path: batches of blobs -> paged cache.

A load is cut into waves of chunks: while the device works on one, the host verifies the next.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from functools import lru_cache, partial
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.artifact import RankArtifact, at_ratio
from kvtc_vllm.codec.base import Blob, read_section
from kvtc_vllm.codec.container import NO_FINGERPRINT
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
from kvtc_vllm.codec.kernels.payload_coding import PayloadCoding, StoredPayloads
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
        sound = (right for task in own.tasks for right in task.result())
        verified: dict[int, VerifiedBlob] = {}
        stored: dict[int, StoredPayloads] = {}
        failed: dict[int, ContainerError] = {}
        room = largest, tokens
        limits = self.coding.payload_room(*room), self.coding.marked_room(*room)
        try:
            for wave in parts:
                count = wave.stop - wave.start
                checked = self._check(chunks[wave], tokens, list(islice(sound, count)))
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
                    step = self._step(here, stored, chunks, part, tokens, slots)
                    if step is None:
                        continue
                    sent = None
                    if self._units.reads_on_device:
                        with thread.copying.after(begin):
                            uploads.send(part)
                            sent = Event(self.device)
                    failed |= decoding.decode(step, partial(self._units.open, uploads, here), sent)
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
        """Whether each blob's is right, in order; on the host's threads, which stage the sound.

        Here they do nothing for which they would wait for each other.
        """

        def check(places: Sequence[int]) -> list[bool]:
            found = [has_checksum(uploads.views[place]) for place in places]
            if self._units.reads_on_device:
                for place, sound in zip(places, found, strict=True):
                    if sound:
                        uploads.stage(place)
            return found

        return [host_threads().submit(check, places) for places in shares(len(uploads.views))]

    def _check(
        self, chunks: Sequence[tuple[LoadChunk, Blob]], tokens: int, sound: Sequence[bool]
    ) -> list[VerifiedBlob | ContainerError]:
        """What each blob holds, or why it is not that of its chunk, at any ratio.

        sound: whether each has its checksum.
        """
        alike: dict[int, list[int]] = {}
        for place, (chunk, _) in enumerate(chunks):
            if sound[place] and chunk.start + tokens <= self._max_position:
                alike.setdefault(self._sinks(chunk.start, tokens), []).append(place)
        known: dict[int, VerifiedBlob] = {}
        for sinks, places in alike.items():
            blobs = [chunks[place][1] for place in places]
            own = [chunks[place][0] for place in places]
            names = [(chunk.start, self._bound_identity(chunk.key)) for chunk in own]
            matched = self._expected_head(tokens, sinks).match(blobs, names)
            known |= {i: blob for i, blob in zip(places, matched, strict=True) if blob is not None}
        return [
            known[place] if place in known else self._look_closely(chunk, blob, tokens)
            for place, (chunk, blob) in enumerate(chunks)
        ]

    def _look_closely(
        self, chunk: LoadChunk, blob: Blob, tokens: int
    ) -> VerifiedBlob | ContainerError:
        try:
            return VerifiedBlob.of(blob, self._verified(blob, chunk.start, tokens, chunk.key))
        except ContainerError as error:
            return error

    def _head_of(self, tokens: int, sinks: int) -> ExpectedHead:
        name = self.ratio, self.artifact.fingerprint, b""
        header = self._new_header(tokens, 0, sinks, *name)
        return ExpectedHead.of(self._sections_of(tokens, sinks, self.ratio), header)

    def _step(
        self,
        verified: Mapping[int, VerifiedBlob],
        stored: Mapping[int, StoredPayloads],
        chunks: Sequence[tuple[LoadChunk, Blob]],
        part: slice,
        tokens: int,
        slots: npt.NDArray[np.int64],
    ) -> DecodeStep | None:
        """The coded tokens of the sound chunks of a part of the load, if there are any."""
        places = range(part.start, part.stop)
        sinks = [verified[i].sinks if i in verified else tokens for i in places]
        own = RowLayout.of([tokens - count for count in sinks])
        if not own.members:
            return None
        coded = np.arange(tokens) >= np.array(sinks, np.int64)[:, None]
        starts = np.array([chunk.start for chunk, _ in chunks[part]], np.int64)
        positions = starts[:, None] + np.arange(tokens)
        layout = RowLayout(tuple(part.start + member for member in own.members), own.tokens)
        payloads = self.coding.plan(layout, [stored[member] for member in layout.members])
        table = own.table.numpy().ravel()
        # One upload: each costs as much as a launch. What begins a table begins 16 bytes.
        tables = [slots[part][coded], positions[coded], table, payloads.numbers]
        padded = [(x, np.zeros(len(x) % 2, np.int64)) for x in tables]
        there = upload(
            torch.from_numpy(np.concatenate([x for y in padded for x in y])), self.device
        )
        ends = np.cumsum([len(x) + len(x) % 2 for x in tables]).tolist()
        own_slots, own_positions, own_table, numbers = (
            there[end - len(x) - len(x) % 2 : end][: len(x)]
            for end, x in zip(ends, tables, strict=True)
        )
        return DecodeStep(
            layout, payloads, own_table.view(-1, 3), own_slots, own_positions, numbers
        )

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
