"""DEFLATE for batches of payloads on a device: by nvCOMP there, or by isal on host threads.

Both read only sections of containers that `container.parse` has accepted, so that no compressed
byte is decoded, or even copied to the device, before its checksum was verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kvtc_vllm.codec.base import read_section
from kvtc_vllm.codec.container import ContainerInfo, Section
from kvtc_vllm.codec.entropy import (
    DEFLATE,
    MAX_UNIT_BYTES,
    Unit,
    UnitList,
    aligned,
    unit_lengths,
)
from kvtc_vllm.codec.entropy.unit_table import CheckedUnits, Lengths, SectionBody, unsound_units
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kernels.deflate_nvcomp import (
    Compressed,
    NvcompDeflate,
    host_threads,
    nvcomp_or_none,
)
from kvtc_vllm.codec.kernels.uploads import UploadedBlobs
from kvtc_vllm.codec.streams import host_buffer


@dataclass(frozen=True)
class PlacedSection:
    """A section of one of the blobs, and where its raw bytes belong in a buffer."""

    blob: int
    section: Section
    place: int


class UnitReader(Protocol):
    """The verified blobs of one batch, ready to be decoded section by section."""

    def inflate(
        self, sections: Sequence[PlacedSection], out: torch.Tensor
    ) -> dict[int, ContainerError]:
        """Decode sections to their places in uint8 `out`, on the current stream.

        Returns the blobs whose section is damaged; its part of `out` is then undefined.
        """
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

    def open(self, blobs: UploadedBlobs, infos: Mapping[int, ContainerInfo]) -> UnitReader:
        """Blobs must stay alive as long as the reader. infos: of those that were verified."""
        ...

    @property
    def reads_on_device(self) -> bool:
        """Whether it reads the device's copy of the blobs, so that there must be one."""
        ...


def unit_coder(device: torch.device) -> UnitCoder:
    """nvCOMP if it works on `device`, else host threads; the log says once if it is the latter."""
    nvcomp = nvcomp_or_none() if device.type == "cuda" else None
    return HostUnitCoder(device) if nvcomp is None else NvcompUnitCoder(nvcomp)


class HostUnitCoder:
    """isal on the host's threads; payloads cross the bus uncompressed."""

    reads_on_device = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def deflate(self, raw: torch.Tensor, starts: Lengths, lengths: Lengths) -> CodedUnits:
        staged = host_buffer(raw.numel(), self._device)
        staged.copy_(raw)
        view = staged.numpy().data
        pieces = [
            view[start : start + length]
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]
        return _HostUnits(list(host_threads().map(_deflate, pieces)))

    def open(self, blobs: UploadedBlobs, infos: Mapping[int, ContainerInfo]) -> UnitReader:
        return _HostReader(blobs.views)


def _deflate(piece: memoryview) -> tuple[int, bytes]:
    """Stored length and padded bytes of one unit."""
    encoded = DEFLATE.encode([bytes(piece)])
    return encoded.units[0].stored_length, encoded.body


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
    def __init__(self, blobs: Sequence[memoryview]) -> None:
        self._blobs = blobs

    def inflate(
        self, sections: Sequence[PlacedSection], out: torch.Tensor
    ) -> dict[int, ContainerError]:
        staged = host_buffer(out.numel(), out.device)
        view = staged.numpy().data
        waiting: list[tuple[int, Future[None]]] = [
            (each.blob, host_threads().submit(self._read, each, view)) for each in sections
        ]
        damaged: dict[int, ContainerError] = {}
        for blob, future in waiting:
            try:
                future.result()
            except ContainerError as error:
                damaged[blob] = error
        out.copy_(staged, non_blocking=True)
        return damaged

    def _read(self, each: PlacedSection, target: memoryview) -> None:
        end = each.place + each.section.raw_length
        target[each.place : end] = read_section(each.section, self._blobs[each.blob])


class NvcompUnitCoder:
    """nvCOMP on the device; only compressed bytes cross the bus."""

    reads_on_device = True

    def __init__(self, nvcomp: NvcompDeflate) -> None:
        self._nvcomp = nvcomp

    def deflate(self, raw: torch.Tensor, starts: Lengths, lengths: Lengths) -> CodedUnits:
        return _NvcompUnits(self._nvcomp, self._nvcomp.compress(raw, starts, lengths), raw.device)

    def open(self, blobs: UploadedBlobs, infos: Mapping[int, ContainerInfo]) -> UnitReader:
        return _NvcompReader(blobs, infos, self._nvcomp)


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
        self, blobs: UploadedBlobs, infos: Mapping[int, ContainerInfo], nvcomp: NvcompDeflate
    ) -> None:
        self._blobs = blobs
        self._nvcomp = nvcomp
        self._kept: list[object] = []
        self._numbers: dict[tuple[int, int], int] = {}
        tables: list[bytes | memoryview] = []
        rows: list[tuple[int, int, int, int]] = []
        for blob, info in infos.items():
            start = blobs.starts[blob]
            for section in info.sections:
                self._numbers[blob, section.offset] = len(rows)
                table, stored = _units(section)
                tables.append(table)
                rows.append((len(table), start + section.offset, stored, section.raw_length))
        # Bytes of the unit table: four per unit.
        pairs = np.frombuffer(b"".join(tables), "<u2").reshape(-1, 2)
        columns = np.array(rows, np.int64).reshape(-1, 4).T
        lengths = pairs.astype(np.int64) + 1
        self._units = CheckedUnits.of(lengths, columns[0] // 4, *columns[1:], blobs.staged)

    def inflate(
        self, sections: Sequence[PlacedSection], out: torch.Tensor
    ) -> dict[int, ContainerError]:
        numbers = np.array([self._numbers[s.blob, s.section.offset] for s in sections], np.int64)
        places = np.zeros(len(self._units.counts), np.int64)
        places[numbers] = [each.place for each in sections]
        sound = self._units.sound[numbers]
        table = self._units.table(numbers[sound], places)
        self._kept.append(self._nvcomp.decompress(self._blobs.on_device, table, out))
        return {
            sections[index].blob: unsound_units(_body(sections[index].section))
            for index in np.flatnonzero(~sound).tolist()
        }


def _units(section: Section) -> tuple[bytes | memoryview, int]:
    """The section's rows of the unit table, and its stored bytes with all padding.

    What is stored raw has no units: it is cut into such that are stored as they are.
    """
    if section.coder_id == DEFLATE.coder_id:
        units = section.units
        listed = units if isinstance(units, UnitList) else UnitList.of(unit_lengths(units))
        return listed.table, section.stored_length
    pieces = range(0, section.stored_length, MAX_UNIT_BYTES)
    sizes = [min(MAX_UNIT_BYTES, section.stored_length - first) for first in pieces]
    # Its own units must be none: with them the sums do not fit.
    lengths = unit_lengths([*section.units, *(Unit(size, size) for size in sizes)])
    return UnitList.of(lengths).table, aligned(section.stored_length)


def _body(section: Section) -> SectionBody:
    return SectionBody(section.units, section.offset, section.stored_length, section.raw_length)
