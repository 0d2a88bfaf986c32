"""DEFLATE for batches of payloads on a device: by nvCOMP there, or by isal on host threads.

Both read only sections of containers that `container.parse` has accepted, so that no compressed
byte is decoded, or even copied to the device, before its checksum was verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch

from kvtc_vllm.codec.base import read_section
from kvtc_vllm.codec.container import Section, joined_rows
from kvtc_vllm.codec.entropy import DEFLATE, MAX_UNIT_BYTES, DeflateCoder, aligned, padded
from kvtc_vllm.codec.entropy.unit_table import CheckedUnits, Lengths, SectionBody, unsound_units
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kernels.deflate_nvcomp import (
    UNDECODED,
    Compressed,
    Decompressed,
    NvcompDeflate,
    host_threads,
    nvcomp_or_none,
)
from kvtc_vllm.codec.kernels.uploads import UploadedBlobs
from kvtc_vllm.codec.kernels.verified import VerifiedBlob
from kvtc_vllm.codec.streams import host_buffer


class PlacedSections(NamedTuple):
    """Sections of the blobs of a load, and where their raw bytes belong in a buffer; int64 [n]."""

    blobs: Lengths
    numbers: Lengths
    """Of each section in its blob."""
    places: Lengths


class UnitReader(Protocol):
    """Verified blobs of one load, ready to be decoded section by section."""

    def inflate(self, sections: PlacedSections, out: torch.Tensor) -> dict[int, ContainerError]:
        """Decode sections to their places in uint8 `out`, on the current stream.

        Returns the blobs whose section is damaged; its part of `out` is then undefined.
        """
        ...

    def damaged(self) -> dict[int, ContainerError]:
        """Blobs of which a unit did not decode to its length. Waits for the device."""
        ...


class CodedUnits(Protocol):
    """What a coder made of a batch of units."""

    @property
    def stored(self) -> Lengths:
        """Stored length of each unit, int64; its raw length where it would not shrink."""
        ...

    def collect(self, places: Lengths, size: int) -> torch.Tensor:
        """The stored bytes of each unit at its place in uint8 [size], zeros between them.

        Does not wait for the device.
        """
        ...


class UnitCoder(Protocol):
    """Encodes units and reads blobs."""

    def deflate(self, raw: torch.Tensor, starts: Lengths, lengths: Lengths) -> CodedUnits:
        """Encode units of a contiguous uint8 tensor. Waits for the device."""
        ...

    def open(self, blobs: UploadedBlobs, verified: Mapping[int, VerifiedBlob]) -> UnitReader:
        """Blobs must stay alive as long as the reader. verified: those that were, by number."""
        ...

    @property
    def reads_on_device(self) -> bool:
        """Whether it reads the device's copy of the blobs, so that there must be one."""
        ...


def unit_coder(device: torch.device, host: DeflateCoder = DEFLATE) -> UnitCoder:
    """nvCOMP if it works on `device`, else host threads; the log says once if it is the latter.

    host: what encodes there. nvCOMP has one way for all codecs, whether they want matches or not:
    units of codec 2 may be some per cent larger with it, and are still of the format.
    """
    nvcomp = nvcomp_or_none() if device.type == "cuda" else None
    return HostUnitCoder(device, host) if nvcomp is None else NvcompUnitCoder(nvcomp)


class HostUnitCoder:
    """isal on the host's threads; payloads cross the bus uncompressed."""

    reads_on_device = False

    def __init__(self, device: torch.device, coder: DeflateCoder = DEFLATE) -> None:
        self._device = device
        self._coder = coder

    def deflate(self, raw: torch.Tensor, starts: Lengths, lengths: Lengths) -> CodedUnits:
        staged = host_buffer(raw.numel(), self._device)
        staged.copy_(raw)
        view = staged.numpy().data
        pieces = [
            view[start : start + length]
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]
        return _HostUnits(list(host_threads().map(partial(_deflate, self._coder), pieces)))

    def open(self, blobs: UploadedBlobs, verified: Mapping[int, VerifiedBlob]) -> UnitReader:
        return _HostReader(verified)


def _deflate(coder: DeflateCoder, piece: memoryview) -> tuple[int, bytes]:
    """Stored length and padded bytes of one unit."""
    stored = coder.encode_unit(bytes(piece))
    return len(stored), padded(stored)


class _HostUnits:
    def __init__(self, coded: Sequence[tuple[int, bytes]]) -> None:
        self._bodies = [body for _, body in coded]
        self.stored = np.array([length for length, _ in coded], np.int64)

    def collect(self, places: Lengths, size: int) -> torch.Tensor:
        out = torch.zeros(size, dtype=torch.uint8)
        view = out.numpy().data
        for place, body in zip(places.tolist(), self._bodies, strict=True):
            view[place : place + len(body)] = body
        return out


class _HostReader:
    def __init__(self, verified: Mapping[int, VerifiedBlob]) -> None:
        self._verified = verified

    def inflate(self, sections: PlacedSections, out: torch.Tensor) -> dict[int, ContainerError]:
        staged = host_buffer(out.numel(), out.device)
        view = staged.numpy().data
        waiting: list[tuple[int, Future[None]]] = [
            (blob, host_threads().submit(self._read, blob, number, place, view))
            for blob, number, place in np.stack(sections, axis=1).tolist()
        ]
        damaged: dict[int, ContainerError] = {}
        for blob, future in waiting:
            try:
                future.result()
            except ContainerError as error:
                damaged[blob] = error
        out.copy_(staged, non_blocking=True)
        return damaged

    def damaged(self) -> dict[int, ContainerError]:
        return {}

    def _read(self, blob: int, number: int, place: int, target: memoryview) -> None:
        verified = self._verified[blob]
        section = verified.section(number)
        target[place : place + section.raw_length] = read_section(section, verified.view)


class NvcompUnitCoder:
    """nvCOMP on the device; only compressed bytes cross the bus."""

    reads_on_device = True

    def __init__(self, nvcomp: NvcompDeflate) -> None:
        self._nvcomp = nvcomp

    def deflate(self, raw: torch.Tensor, starts: Lengths, lengths: Lengths) -> CodedUnits:
        return _NvcompUnits(self._nvcomp, self._nvcomp.compress(raw, starts, lengths), raw.device)

    def open(self, blobs: UploadedBlobs, verified: Mapping[int, VerifiedBlob]) -> UnitReader:
        return _NvcompReader(blobs, verified, self._nvcomp)


class _NvcompUnits:
    def __init__(self, nvcomp: NvcompDeflate, units: Compressed, device: torch.device) -> None:
        self._nvcomp, self._units, self._device = nvcomp, units, device
        self._kept: object = None

    @property
    def stored(self) -> Lengths:
        return self._units.stored

    def collect(self, places: Lengths, size: int) -> torch.Tensor:
        out = torch.zeros(size, dtype=torch.uint8, device=self._device)
        self._kept = self._nvcomp.collect(self._units, places, out)
        return out


class _NvcompReader:
    """Units are looked up in one table, made once: a load has thousands in hundreds of sections."""

    def __init__(
        self, blobs: UploadedBlobs, verified: Mapping[int, VerifiedBlob], nvcomp: NvcompDeflate
    ) -> None:
        self._blobs = blobs
        self._verified = verified
        self._nvcomp = nvcomp
        self._running: list[tuple[Decompressed, Lengths]] = []
        """What was begun, and the blob of each of its units."""
        tables = [each.tables for each in verified.values()]
        rows = joined_rows(tables)
        counts = np.array([len(table.sections) for table in tables], np.int64)
        ends = counts.cumsum()
        self._first = np.zeros(len(blobs.views), np.int64)
        """Of each blob the number of its first section among those of all."""
        self._first[list(verified)] = ends - counts
        raw, stored, units, coders = (
            rows[name].astype(np.int64)
            for name in ("raw_length", "stored_length", "units", "coder_id")
        )
        padded = aligned(stored)
        before = padded.cumsum() - padded
        bodies = np.array(
            [blobs.starts[blob] + each.tables.body for blob, each in verified.items()], np.int64
        )
        # Every blob has a section: it has tokens.
        starts = before + np.repeat(bodies - before[ends - counts], counts)
        pairs = np.frombuffer(b"".join(table.units for table in tables), "<u2").reshape(-1, 2)
        lengths = pairs.astype(np.int64) + 1
        plain = np.flatnonzero(coders != DEFLATE.coder_id)
        if len(plain):
            lengths, units = _with_pieces(lengths, units, stored, plain)
            # What is stored raw has no padding of its own; the container's is zero.
            stored = np.where(coders != DEFLATE.coder_id, padded, stored)
        self._units = CheckedUnits.of(lengths, units, starts, stored, raw, blobs.staged)

    def inflate(self, sections: PlacedSections, out: torch.Tensor) -> dict[int, ContainerError]:
        numbers = self._first[sections.blobs] + sections.numbers
        places = np.zeros(len(self._units.counts), np.int64)
        places[numbers] = sections.places
        sound = self._units.sound[numbers]
        table = self._units.table(numbers[sound], places)
        found = self._nvcomp.decompress(self._blobs.on_device, table, out)
        owners = np.repeat(sections.blobs[sound], self._units.counts[numbers[sound]])
        self._running.append((found, owners))
        return {
            blob: unsound_units(_body(self._verified[blob].section(number)))
            for blob, number in zip(
                sections.blobs[~sound].tolist(), sections.numbers[~sound].tolist(), strict=True
            )
        }

    def damaged(self) -> dict[int, ContainerError]:
        bad = {
            blob
            for found, owners in self._running
            for blob in owners[found.bad.cpu().numpy()].tolist()
        }
        return {blob: ContainerError("entropy", UNDECODED) for blob in bad}


def _with_pieces(
    lengths: Lengths, units: Lengths, stored: Lengths, plain: Lengths
) -> tuple[Lengths, Lengths]:
    """Lengths and numbers of units, with units for what is stored raw and has none.

    It is cut into such that are stored as they are. Units that it has in spite of that stay: with
    them the sums do not fit, and the section is refused.
    """
    pieces = -(-stored[plain] // MAX_UNIT_BYTES)
    place = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)
    left = np.repeat(stored[plain], pieces) - place * MAX_UNIT_BYTES
    sizes = np.minimum(left, MAX_UNIT_BYTES)
    after = np.repeat(units.cumsum()[plain], pieces)
    counts = units.copy()
    counts[plain] += pieces
    return np.insert(lengths, after, np.stack((sizes, sizes), axis=1), axis=0), counts


def _body(section: Section) -> SectionBody:
    return SectionBody(section.units, section.offset, section.stored_length, section.raw_length)
