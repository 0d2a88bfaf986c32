"""deflate-nvcomp: the units of `deflate_cpu`, coded on the GPU by nvCOMP's batched raw DEFLATE.

nvCOMP (packages nvidia-nvcomp-cu12 / -cu13, >=6,<7; written against 6.0.0.12) is an optional
extra under NVIDIA's own licence. Where it or a GPU is missing, `NvcompCoder` uses isal on host
threads and says so once.

A corrupt stream is undefined behaviour for nvCOMP. Compressed bytes must therefore come out of a
container whose checksum was verified (`container.parse`) and through `unit_table`. What nvCOMP
notices all the same is reported.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
import triton.language as tl

from kvtc_vllm.codec.entropy.base import (
    MAX_UNIT_BYTES,
    EncodedSection,
    Unit,
    UnitList,
    aligned,
    cut_units,
    padded,
    unit_size,
)
from kvtc_vllm.codec.entropy.deflate_cpu import DEFLATE
from kvtc_vllm.codec.entropy.unit_table import Lengths, UnitTable, checked_table
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kernels.jit import jit
from kvtc_vllm.codec.kernels.nvcomp_library import (
    Batch,
    NvcompLibrary,
    NvcompUnavailable,
    load_nvcomp,
)
from kvtc_vllm.codec.streams import SideStream, synchronize, upload

logger = logging.getLogger(__name__)

_ALIGNMENT = 16
_COPY_TILE = 4096
UNDECODED = "a unit does not decode to its raw length"
_CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Compressed:
    """Units on the device, each at a place of its own. Arrays are int64 [n], on the host."""

    addresses: Lengths
    """Device address of the stored bytes of each unit."""
    stored: Lengths
    """Bytes of each; its raw length where it would not shrink, and then `addresses` is of it."""
    kept: tuple[object, ...]
    """What the addresses point into."""


@dataclass(frozen=True)
class Decompressed:
    """Units on their way to their places.

    bad: bool [n] on the device, in the order of the units: those that nvCOMP could not decode to
    their raw length. kept: must stay until the work has run.
    """

    bad: torch.Tensor
    kept: tuple[object, ...]


class NvcompDeflate:
    """Batches of units between torch CUDA tensors, on the caller's current stream.

    library: None for the installed one; raises NvcompUnavailable without it or a GPU. Any thread;
    threads on streams of their own do not wait for each other.
    """

    def __init__(self, library: NvcompLibrary | None = None) -> None:
        self._library = load_nvcomp() if library is None else library
        self._rooms: dict[int, int] = {}

    def compress(self, raw: torch.Tensor, starts: Lengths, lengths: Lengths) -> Compressed:
        """Compress units of a contiguous uint8 tensor that begin at `starts`.

        Waits for the device, because sizes are needed on the host. Takes 2.3 to 4.6 times the
        bytes of `raw` on the device.
        """
        if not len(lengths):
            return Compressed(lengths, lengths, ())
        # The largest first: what is left for the end of the launch is short.
        order = _largest_first(lengths)
        sizes = lengths[order]
        classes = size_classes(sizes)
        rooms = np.empty_like(sizes)
        for units in classes:
            rooms[units] = self._room(int(sizes[units.start]))
        places = rooms.cumsum() - rooms
        scratch = torch.empty(int(rooms.sum()), dtype=torch.uint8, device=raw.device)
        addresses = raw.data_ptr() + starts[order], scratch.data_ptr() + places
        table = upload(torch.from_numpy(np.stack((*addresses, sizes))), raw.device)
        found = torch.zeros((2, len(sizes)), dtype=torch.int64, device=raw.device)
        statuses = found[1].view(torch.int32)
        kept: list[object] = [table]
        for units in classes:
            batch = Batch(
                sources=table[0, units],
                source_bytes=table[2, units],
                targets=table[1, units],
                target_bytes=found[0, units],
                statuses=statuses[units],
                largest=int(sizes[units.start]),
                total=int(sizes[units].sum()),
            )
            kept.append(self._library.compress(batch, _stream(raw.device)))
        synchronize(raw.device)
        ordered, status_words = found.cpu().numpy()
        failed = status_words.view(np.int32)[: len(sizes)] != 0
        ordered[failed] = sizes[failed]
        found_sizes = np.empty_like(lengths)
        found_sizes[order] = ordered
        shrunk = np.empty_like(lengths)
        shrunk[order] = scratch.data_ptr() + places
        coded = found_sizes < lengths
        return Compressed(
            np.where(coded, shrunk, raw.data_ptr() + starts),
            np.where(coded, found_sizes, lengths),
            (raw, scratch),
        )

    def collect(self, units: Compressed, places: Lengths, out: torch.Tensor) -> object:
        """Copy the stored bytes of every unit to its place in a uint8 tensor.

        Does not wait for the device. What is returned must be kept until the work has run.
        """
        return [
            units.kept,
            *self._copy(units.addresses, out.data_ptr() + places, units.stored, out.device),
        ]

    def decompress(self, body: torch.Tensor, units: UnitTable, out: torch.Tensor) -> Decompressed:
        """Decode verified units of a contiguous uint8 tensor to their places in `out`.

        Does not wait for the device.
        """
        plain = units.stored == units.raw
        kept: list[object] = []
        if plain.any():
            kept += self._copy(
                body.data_ptr() + units.offsets[plain],
                out.data_ptr() + units.places[plain],
                units.raw[plain],
                out.device,
            )
        bad = torch.zeros(len(plain), dtype=torch.bool, device=out.device)
        coded = np.flatnonzero(~plain)
        if len(coded):
            coded = coded[_largest_first(units.raw[coded])]
            addresses = (
                body.data_ptr() + units.offsets[coded],
                out.data_ptr() + units.places[coded],
            )
            columns = np.stack((*addresses, units.stored[coded], units.raw[coded], coded))
            table = upload(torch.from_numpy(columns), out.device)
            found = torch.zeros((2, len(coded)), dtype=torch.int64, device=out.device)
            batch = Batch(
                sources=table[0],
                source_bytes=table[2],
                targets=table[1],
                target_bytes=found[0],
                statuses=found[1].view(torch.int32)[: len(coded)],
                largest=int(units.raw[coded[0]]),
                total=int(units.raw[coded].sum()),
            )
            kept += [table, self._library.decompress(batch, table[3], _stream(out.device))]
            bad[table[4]] = (batch.statuses != 0) | (batch.target_bytes != table[3])
        return Decompressed(bad, tuple(kept))

    @staticmethod
    def _copy(
        sources: Lengths, targets: Lengths, lengths: Lengths, device: torch.device
    ) -> list[object]:
        """`copy_ranges` of host arrays. What is returned must be kept until the work has run."""
        table = upload(torch.from_numpy(np.stack((sources, targets, lengths))), device)
        copy_ranges(table[0], table[1], table[2])
        return [table]

    def _room(self, size: int) -> int:
        """Bytes for each unit of a batch of units up to `size`, aligned for the next."""
        if size not in self._rooms:
            most = self._library.max_compressed_bytes(size)
            self._rooms[size] = -(-most // _ALIGNMENT) * _ALIGNMENT
        return self._rooms[size]


def _largest_first(sizes: Lengths) -> Lengths:
    """The order of units by their raw bytes, of which each has at least one; stable.

    Of 16 bits, numpy sorts by counting, several times as fast.
    """
    return np.argsort((MAX_UNIT_BYTES - sizes).astype(np.uint16), kind="stable")


def size_classes(sizes: Lengths) -> list[slice]:
    """Descending sizes, cut where they have fallen to half of a class's first.

    nvCOMP wants room in every output of a batch for what the batch's largest unit could take.
    Batches of similar units bound that to twice what each needs.
    """
    classes: list[slice] = []
    first = 0
    while first < len(sizes):
        end = int(np.searchsorted(-sizes, -(sizes[first] // 2)))
        classes.append(slice(first, end))
        first = end
    return classes


def copy_ranges(sources: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor) -> None:
    """Copy lengths[i] bytes from address sources[i] to targets[i], all int64 [n] on one device.

    Ranges must not overlap, and none may be longer than MAX_UNIT_BYTES.
    """
    if len(lengths):
        grid = (len(lengths), MAX_UNIT_BYTES // _COPY_TILE)
        _copy_kernel[grid](sources, targets, lengths, TILE=_COPY_TILE)


# Rows of a table: with an odd number of units the second begins anywhere.
@jit(any_alignment=("sources", "targets", "lengths"))
def _copy_kernel(sources, targets, lengths, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = place < tl.load(lengths + index)
    source = tl.load(sources + index).to(tl.pointer_type(tl.uint8))
    target = tl.load(targets + index).to(tl.pointer_type(tl.uint8))
    tl.store(target + place, tl.load(source + place, mask=inside, other=0), mask=inside)


class NvcompCoder:
    """`EntropyCoder` over `NvcompDeflate`; the same format, hence the same number, as `deflate`."""

    name = "deflate-nvcomp"
    coder_id = DEFLATE.coder_id

    def encode(self, streams: Sequence[bytes]) -> EncodedSection:
        device = self._device
        if device is None:
            return encode_on_threads(streams)
        lengths = list(cut_units(map(len, streams)))
        if not lengths:
            return EncodedSection((), b"")
        raw = torch.frombuffer(bytearray(b"".join(streams)), dtype=torch.uint8)
        with SideStream(_CUDA).to_end():
            whole = np.array(lengths, np.int64)
            units = device.compress(raw.to(_CUDA), whole.cumsum() - whole, whole)
            ends = aligned(units.stored).cumsum()
            body = torch.zeros(int(ends[-1]), dtype=torch.uint8, device=_CUDA)
            kept = device.collect(units, ends - aligned(units.stored), body)
            stored = body.cpu().numpy().tobytes()
        del kept
        return EncodedSection(UnitList.of(np.stack((whole, units.stored), axis=1)), stored)

    def decode(self, units: Sequence[Unit], body: memoryview, raw_length: int) -> bytearray:
        device = self._device
        if device is None:
            return decode_on_threads(units, body, raw_length)
        table = checked_table(units, body, raw_length)
        if not units:
            return bytearray()
        with SideStream(_CUDA).to_end():
            stored = torch.frombuffer(bytearray(body), dtype=torch.uint8).to(_CUDA)
            out = torch.empty(raw_length, dtype=torch.uint8, device=_CUDA)
            found = device.decompress(stored, table, out)
            raw = bytearray(out.cpu().numpy().tobytes())
            if bool(found.bad.any()):
                raise ContainerError("entropy", UNDECODED)
        return raw

    @cached_property
    def _device(self) -> NvcompDeflate | None:
        return nvcomp_or_none()


@lru_cache(maxsize=1)
def nvcomp_or_none() -> NvcompDeflate | None:
    """The process's nvCOMP coder, or None, with one log line that says why."""
    try:
        return NvcompDeflate()
    except NvcompUnavailable as error:
        logger.warning("DEFLATE runs on host threads (isal): %s", error)
        return None


def encode_on_threads(streams: Sequence[bytes]) -> EncodedSection:
    """What `DEFLATE.encode` gives, one host thread per unit."""
    pieces = [
        stream[first : first + size]
        for stream in streams
        for size in (unit_size(len(stream)),)
        for first in range(0, len(stream), size)
    ]
    coded = list(host_threads().map(DEFLATE.encode_unit, pieces))
    sizes = [(len(raw), len(stored)) for raw, stored in zip(pieces, coded, strict=True)]
    return EncodedSection(tuple(Unit(*pair) for pair in sizes), b"".join(map(padded, coded)))


def decode_on_threads(units: Sequence[Unit], body: memoryview, raw_length: int) -> bytearray:
    """What `DEFLATE.decode` gives, one host thread per unit."""
    offsets = checked_table(units, body, raw_length).offsets.tolist()

    def decode_unit(index: int) -> bytearray:
        unit = units[index]
        part = body[offsets[index] :][: aligned(unit.stored_length)]
        return DEFLATE.decode([unit], part, unit.raw_length)

    return bytearray(b"".join(host_threads().map(decode_unit, range(len(units)))))


@lru_cache(maxsize=1)
def host_threads() -> ThreadPoolExecutor:
    """The process's threads for DEFLATE, checksums and copies on the host, which release the GIL.

    One for two processors: on those of a server two threads share a core, and checksums and
    copies of a load took half as long with 8 threads on 16 as with 16.
    """
    return ThreadPoolExecutor(
        max(2, min((os.cpu_count() or 1) // 2, 16)), thread_name_prefix="kvtc-deflate"
    )


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


NVCOMP = NvcompCoder()
