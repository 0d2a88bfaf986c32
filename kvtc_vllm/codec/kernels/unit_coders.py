"""DEFLATE for batches of payloads on a device: by nvCOMP there, or by isal on host threads.

Both read only sections of containers that `container.parse` has accepted, so that no compressed
byte is decoded, or even copied to the device, before its checksum was verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from itertools import accumulate
from typing import Protocol

import torch

from kvtc_vllm.codec.base import read_section
from kvtc_vllm.codec.container import Section
from kvtc_vllm.codec.entropy import DEFLATE, MAX_UNIT_BYTES, Unit, aligned
from kvtc_vllm.codec.entropy.unit_table import SectionBody, unit_table, unsound_units
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kernels.deflate_nvcomp import NvcompDeflate, host_threads, nvcomp_or_none
from kvtc_vllm.codec.streams import host_buffer


class UnitReader(Protocol):
    """The verified blobs of one batch, ready to be decoded section by section."""

    def inflate(
        self, sections: Sequence[tuple[int, Section]], out: torch.Tensor
    ) -> dict[int, ContainerError]:
        """Decode sections (number of the blob, section) one after the other into uint8 `out`.

        Returns the blobs whose section is damaged; its part of `out` is then undefined.
        """
        ...


class UnitCoder(Protocol):
    """Encodes units and opens blobs."""

    def deflate(self, raw: torch.Tensor, lengths: Sequence[int]) -> tuple[list[int], memoryview]:
        """Encode consecutive units of a contiguous uint8 tensor.

        Returns stored lengths and body as `EncodedSection` has them. Waits for the device.
        """
        ...

    def open(self, blobs: Sequence[memoryview]) -> UnitReader:
        """Blobs must have been verified, and stay alive as long as the reader."""
        ...


def unit_coder(device: torch.device) -> UnitCoder:
    """nvCOMP if it works on `device`, else host threads; the log says once if it is the latter."""
    nvcomp = nvcomp_or_none() if device.type == "cuda" else None
    return HostUnitCoder(device) if nvcomp is None else NvcompUnitCoder(device, nvcomp)


class HostUnitCoder:
    """isal on the host's threads; payloads cross the bus uncompressed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def deflate(self, raw: torch.Tensor, lengths: Sequence[int]) -> tuple[list[int], memoryview]:
        staged = host_buffer(raw.numel(), self._device)
        staged.copy_(raw)
        view = staged.numpy().data
        starts = accumulate(lengths, initial=0)
        pieces = [view[start : start + length] for start, length in zip(starts, lengths)]  # noqa: B905
        encoded = list(host_threads().map(lambda piece: DEFLATE.encode([bytes(piece)]), pieces))
        stored = [part.units[0].stored_length for part in encoded]
        return stored, memoryview(b"".join(part.body for part in encoded))

    def open(self, blobs: Sequence[memoryview]) -> UnitReader:
        return _HostReader(blobs)


class _HostReader:
    def __init__(self, blobs: Sequence[memoryview]) -> None:
        self._blobs = blobs

    def inflate(
        self, sections: Sequence[tuple[int, Section]], out: torch.Tensor
    ) -> dict[int, ContainerError]:
        staged = host_buffer(out.numel(), out.device)
        view = staged.numpy().data
        starts = accumulate((section.raw_length for _, section in sections), initial=0)
        waiting: list[tuple[int, Future[None]]] = [
            (blob, host_threads().submit(self._read, blob, section, view[start:]))
            for start, (blob, section) in zip(starts, sections)  # noqa: B905
        ]
        damaged: dict[int, ContainerError] = {}
        for blob, future in waiting:
            try:
                future.result()
            except ContainerError as error:
                damaged[blob] = error
        out.copy_(staged, non_blocking=True)
        return damaged

    def _read(self, blob: int, section: Section, target: memoryview) -> None:
        target[: section.raw_length] = read_section(section, self._blobs[blob])


class NvcompUnitCoder:
    """nvCOMP on the device; only compressed bytes cross the bus."""

    def __init__(self, device: torch.device, nvcomp: NvcompDeflate) -> None:
        self._device = device
        self._nvcomp = nvcomp

    def deflate(self, raw: torch.Tensor, lengths: Sequence[int]) -> tuple[list[int], memoryview]:
        units = self._nvcomp.compress(raw, lengths)
        ends = aligned(units.stored).cumsum()
        body = torch.zeros(int(ends[-1]) if len(ends) else 0, dtype=torch.uint8, device=raw.device)
        kept = self._nvcomp.collect(units, ends - aligned(units.stored), body)
        staged = host_buffer(body.numel(), self._device)
        staged.copy_(body)
        del kept
        return units.stored.tolist(), staged.numpy().data

    def open(self, blobs: Sequence[memoryview]) -> UnitReader:
        return _NvcompReader(blobs, self._device, self._nvcomp)


class _NvcompReader:
    """Blobs on the device, copied once on the stream that is current when it is made."""

    def __init__(
        self, blobs: Sequence[memoryview], device: torch.device, nvcomp: NvcompDeflate
    ) -> None:
        self._blobs = blobs
        self._nvcomp = nvcomp
        self._starts = [0, *accumulate(aligned(len(blob)) for blob in blobs)]
        staged = host_buffer(self._starts[-1], device)
        view = staged.numpy().data

        def stage(index: int) -> None:
            view[self._starts[index] : self._starts[index] + len(blobs[index])] = blobs[index]

        list(host_threads().map(stage, range(len(blobs))))
        self._staged = staged.numpy()
        self._bytes = staged.to(device, non_blocking=True)
        self._kept: list[object] = []

    def inflate(
        self, sections: Sequence[tuple[int, Section]], out: torch.Tensor
    ) -> dict[int, ContainerError]:
        bodies = [self._body(blob, section) for blob, section in sections]
        table, unsound = unit_table(bodies, self._staged)
        self._kept.append(self._nvcomp.decompress(self._bytes, table, out))
        return {sections[index][0]: unsound_units(bodies[index]) for index in unsound}

    def _body(self, blob: int, section: Section) -> SectionBody:
        start = self._starts[blob] + section.offset
        if section.coder_id == DEFLATE.coder_id:
            return SectionBody(section.units, start, section.stored_length, section.raw_length)
        pieces = range(0, section.stored_length, MAX_UNIT_BYTES)
        sizes = [min(MAX_UNIT_BYTES, section.stored_length - first) for first in pieces]
        units = [*section.units, *(Unit(size, size) for size in sizes)]
        # What is stored raw has no padding of its own; the container's is zero.
        return SectionBody(units, start, aligned(section.stored_length), section.raw_length)
