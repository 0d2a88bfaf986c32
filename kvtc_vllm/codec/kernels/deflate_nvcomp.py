"""deflate-nvcomp: the units of `deflate_cpu`, coded on the GPU by nvCOMP's batched raw DEFLATE.

nvCOMP (packages nvidia-nvcomp-cu12 / -cu13, >=6,<7; written against 6.0.0.12) is an optional
extra under NVIDIA's own licence. Where it or a GPU is missing, `NvcompCoder` uses isal on host
threads and says so once.

A corrupt stream is undefined behaviour for nvCOMP. Compressed bytes must therefore come out of a
container whose checksum was verified (`container.parse`) and through `unit_table`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
import triton.language as tl

from kvtc_vllm.codec.entropy.base import (
    MAX_UNIT_BYTES,
    EncodedSection,
    Unit,
    UnitList,
    aligned,
)
from kvtc_vllm.codec.entropy.deflate_cpu import DEFLATE
from kvtc_vllm.codec.entropy.unit_table import Lengths, UnitTable, checked_table
from kvtc_vllm.codec.kernels.jit import jit
from kvtc_vllm.codec.streams import SideStream, synchronize, upload

logger = logging.getLogger(__name__)

ENTROPY_ONLY = 0
"""nvCOMP's fastest algorithm. On packed codes matches hardly ever help, the Huffman table does."""
_ALIGNMENT = 16
_COPY_TILE = 4096
_CUDA = torch.device("cuda")


class NvcompUnavailable(Exception):
    """nvCOMP cannot be used here; the text says why."""


@dataclass(frozen=True)
class Compressed:
    """Units on the device, each at a place of its own. Arrays are int64 [n], on the host."""

    addresses: Lengths
    """Device address of the stored bytes of each unit."""
    stored: Lengths
    """Bytes of each; its raw length where it would not shrink, and then `addresses` is of it."""
    kept: tuple[torch.Tensor, ...]
    """What the addresses point into."""


@dataclass(frozen=True)
class _StreamCodec:
    """nvCOMP binds a codec to a device and a stream. lock: held while it is given work, never
    while anybody waits for the device."""

    codec: Any
    stream: int
    bounds: dict[int, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class NvcompDeflate:
    """Batches of units between torch CUDA tensors, on the caller's current stream.

    That must not be the default stream: nvCOMP's documentation does not say whether 0 means it or
    a stream of nvCOMP's own. Raises NvcompUnavailable without nvCOMP 6 or a GPU. Thread-safe;
    threads on streams of their own do not wait for each other.
    """

    def __init__(self, algorithm: int = ENTROPY_ONLY) -> None:
        self._nvcomp = _import_nvcomp()
        self._algorithm = algorithm
        self._codecs: dict[tuple[int, int], _StreamCodec] = {}
        self._lock = threading.Lock()

    def compress(self, raw: torch.Tensor, starts: Lengths, lengths: Lengths) -> Compressed:
        """Compress units of a contiguous uint8 tensor that begin at `starts`.

        Waits for the device, because sizes are needed on the host. Takes about 2.3 times the
        bytes of `raw` on the device. Raises RuntimeError on the default stream.
        """
        if not len(lengths):
            return Compressed(lengths, lengths, ())
        # The largest first: what is left for the end of the launch is short.
        order = np.argsort(-lengths, kind="stable")
        bound = self._codec(raw.device)
        with bound.lock:
            rooms = self._rooms(bound, raw, lengths[order])
            places = rooms.cumsum() - rooms
            scratch = torch.empty(int(rooms.sum()), dtype=torch.uint8, device=raw.device)
            source = self._arrays(raw, starts[order], lengths[order], bound.stream)
            target = self._arrays(scratch, places, rooms, bound.stream)
            encoded = bound.codec.encode(source, out=target)
        # nvCOMP would wait for the device with Python's lock held, and stop every thread.
        synchronize(raw.device)
        sizes = np.empty_like(lengths)
        sizes[order] = encoded.buffer_sizes
        shrunk = np.empty_like(lengths)
        shrunk[order] = scratch.data_ptr() + places
        coded = sizes < lengths
        return Compressed(
            np.where(coded, shrunk, raw.data_ptr() + starts),
            np.where(coded, sizes, lengths),
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

    def decompress(self, body: torch.Tensor, units: UnitTable, out: torch.Tensor) -> object:
        """Decode verified units of a contiguous uint8 tensor to their places in `out`.

        Does not wait for the device. What is returned must be kept until the work has run.
        Raises RuntimeError on the default stream.
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
        coded = np.flatnonzero(~plain)
        if len(coded):
            coded = coded[np.argsort(-units.raw[coded], kind="stable")]
            bound = self._codec(out.device)
            sizes = units.raw[coded]
            with bound.lock:
                source = self._arrays(body, units.offsets[coded], units.stored[coded], bound.stream)
                target = self._arrays(out, units.places[coded], sizes, bound.stream)
                # Sizes from the unit table: without them nvCOMP would walk every stream to
                # learn its length, and wait for that.
                codec = bound.codec
                config = codec.decompression_config(codec.compression_config(sizes.tolist()))
                codec.decode(source, out=target, decompression_config=config)
            kept += [source, target, config]
        return kept

    def _arrays(self, buffer: torch.Tensor, first: Lengths, sizes: Lengths, stream: int) -> Any:
        return self._nvcomp.as_arrays(buffer, first.tolist(), sizes.tolist(), cuda_stream=stream)

    @staticmethod
    def _copy(
        sources: Lengths, targets: Lengths, lengths: Lengths, device: torch.device
    ) -> list[object]:
        """`copy_ranges` of host arrays. What is returned must be kept until the work has run."""
        table = upload(torch.from_numpy(np.stack((sources, targets, lengths))), device)
        copy_ranges(table[0], table[1], table[2])
        return [table]

    def _codec(self, device: torch.device) -> _StreamCodec:
        """The codec of the current stream."""
        stream = _stream(device)
        if stream == 0:
            raise RuntimeError("nvCOMP needs another stream than the default one")
        index = torch.cuda.current_device() if device.index is None else device.index
        with self._lock:
            if (index, stream) not in self._codecs:
                codec = self._nvcomp.Codec(
                    algorithm="Deflate",
                    algorithm_type=self._algorithm,
                    bitstream_kind=self._nvcomp.BitstreamKind.RAW,
                    uncomp_chunk_size=MAX_UNIT_BYTES,
                    device_id=index,
                    cuda_stream=stream,
                )
                self._codecs[index, stream] = _StreamCodec(codec, stream)
            return self._codecs[index, stream]

    def _rooms(self, bound: _StreamCodec, raw: torch.Tensor, sizes: Lengths) -> Lengths:
        """Most bytes that each compressed unit can take, aligned for the next."""
        distinct, where = np.unique(sizes, return_inverse=True)
        new = [size for size in distinct.tolist() if size not in bound.bounds]
        if new:
            whole = torch.empty(MAX_UNIT_BYTES, dtype=torch.uint8, device=raw.device)
            for size in new:
                unit = self._nvcomp.as_array(whole[:size], cuda_stream=bound.stream)
                most = int(bound.codec.get_max_comp_buffer_size(unit))
                bound.bounds[size] = -(-most // _ALIGNMENT) * _ALIGNMENT
        return np.array([bound.bounds[size] for size in distinct.tolist()], np.int64)[where]


def copy_ranges(sources: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor) -> None:
    """Copy lengths[i] bytes from address sources[i] to targets[i], all int64 [n] on one device.

    Ranges must not overlap, and none may be longer than MAX_UNIT_BYTES.
    """
    if len(lengths):
        grid = (len(lengths), MAX_UNIT_BYTES // _COPY_TILE)
        _copy_kernel[grid](sources, targets, lengths, TILE=_COPY_TILE)


@jit()
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
        lengths = [
            min(MAX_UNIT_BYTES, len(stream) - first)
            for stream in streams
            for first in range(0, len(stream), MAX_UNIT_BYTES)
        ]
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
            kept = device.decompress(stored, table, out)
            raw = bytearray(out.cpu().numpy().tobytes())
        del kept
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
        stream[first : first + MAX_UNIT_BYTES]
        for stream in streams
        for first in range(0, len(stream), MAX_UNIT_BYTES)
    ]
    parts = list(host_threads().map(lambda piece: DEFLATE.encode([piece]), pieces))
    units = tuple(unit for part in parts for unit in part.units)
    return EncodedSection(units, b"".join(part.body for part in parts))


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
    """The process's threads for DEFLATE on the host; isal releases the GIL while it works."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, 16), thread_name_prefix="kvtc-deflate")


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def _import_nvcomp() -> Any:
    if not torch.cuda.is_available():
        raise NvcompUnavailable("there is no CUDA device")
    try:
        from nvidia import nvcomp
    except ImportError as error:
        message = f"nvCOMP is not installed ({error}); see the extras cu12, cu13"
        raise NvcompUnavailable(message) from error
    if nvcomp.__version__.split(".")[0] != "6":
        raise NvcompUnavailable(f"nvCOMP {nvcomp.__version__} is not version 6")
    return nvcomp


NVCOMP = NvcompCoder()
