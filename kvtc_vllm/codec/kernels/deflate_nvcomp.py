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
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import triton.language as tl

from kvtc_vllm.codec.entropy.base import MAX_UNIT_BYTES, EncodedSection, Unit, aligned
from kvtc_vllm.codec.entropy.deflate_cpu import DEFLATE
from kvtc_vllm.codec.entropy.unit_table import Lengths, UnitTable, checked_table
from kvtc_vllm.codec.kernels.jit import jit
from kvtc_vllm.codec.streams import upload

logger = logging.getLogger(__name__)

ENTROPY_ONLY = 0
"""nvCOMP's fastest algorithm. On packed codes matches hardly ever help, the Huffman table does."""
SLAB_UNITS = 512
"""Units compressed at once: their worst-case output takes 148256 bytes each, 76 MB in all."""
_ALIGNMENT = 16
_COPY_TILE = 4096


class NvcompUnavailable(Exception):
    """nvCOMP cannot be used here; the text says why."""


class NvcompDeflate:
    """Batches of units between torch CUDA tensors, on the caller's current stream.

    Raises NvcompUnavailable without nvCOMP 6 or a GPU. Thread-safe.
    """

    def __init__(self, algorithm: int = ENTROPY_ONLY) -> None:
        self._nvcomp = _import_nvcomp()
        self._algorithm = algorithm
        self._codecs: dict[tuple[int, int], Any] = {}
        self._lock = threading.Lock()

    def compress(self, raw: torch.Tensor, lengths: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        """Compress consecutive units of a contiguous uint8 tensor.

        Returns the stored length of every unit (its raw length where it would not shrink) and
        the body on the device: units in order, each padded with zeros to `UNIT_ALIGNMENT`.
        Waits for the device, because sizes are needed on the host.
        """
        starts = [0, *accumulate(lengths)][:-1]
        stored: list[int] = []
        parts: list[torch.Tensor] = []
        for first in range(0, len(lengths), SLAB_UNITS):
            slab = slice(first, first + SLAB_UNITS)
            sizes, part = self._compress_slab(raw, starts[slab], lengths[slab])
            stored += sizes
            parts.append(part)
        return stored, torch.cat(parts) if parts else raw.new_empty(0)

    def decompress(self, body: torch.Tensor, units: UnitTable, out: torch.Tensor) -> object:
        """Decode verified units of a contiguous uint8 tensor to their places in `out`.

        Does not wait for the device. What is returned must be kept until the work has run.
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
        coded = ~plain
        if coded.any():
            with self._lock:
                stream = _stream(out.device)
                codec = self._codec(out.device, stream)
                offsets, stored = units.offsets[coded].tolist(), units.stored[coded].tolist()
                sizes = units.raw[coded].tolist()
                source = self._nvcomp.as_arrays(body, offsets, stored, cuda_stream=stream)
                target = self._nvcomp.as_arrays(
                    out, units.places[coded].tolist(), sizes, cuda_stream=stream
                )
                # Sizes from the unit table: without them nvCOMP would walk every stream to
                # learn its length, and wait for that.
                config = codec.decompression_config(codec.compression_config(sizes))
                codec.decode(source, out=target, decompression_config=config)
                kept += [source, target, config]
        return kept

    def _compress_slab(
        self, raw: torch.Tensor, starts: Sequence[int], lengths: Sequence[int]
    ) -> tuple[list[int], torch.Tensor]:
        count = len(lengths)
        with self._lock:
            stream = _stream(raw.device)
            codec = self._codec(raw.device, stream)
            bound = self._bound(codec, raw)
            scratch = torch.empty(count * bound, dtype=torch.uint8, device=raw.device)
            places = [i * bound for i in range(count)]
            source = self._nvcomp.as_arrays(raw, list(starts), list(lengths), cuda_stream=stream)
            target = self._nvcomp.as_arrays(scratch, places, [bound] * count, cuda_stream=stream)
            sizes = codec.encode(source, out=target).buffer_sizes
        raw_lengths = np.array(lengths, np.int64)
        stored = np.minimum(np.array(sizes, np.int64), raw_lengths)
        ends = aligned(stored).cumsum()
        body = torch.zeros(int(ends[-1]), dtype=torch.uint8, device=raw.device)
        self._copy(
            np.where(
                stored < raw_lengths,
                scratch.data_ptr() + np.array(places, np.int64),
                raw.data_ptr() + np.array(starts, np.int64),
            ),
            body.data_ptr() + np.concatenate(([0], ends[:-1])),
            stored,
            raw.device,
        )
        return stored.tolist(), body

    @staticmethod
    def _copy(
        sources: Lengths, targets: Lengths, lengths: Lengths, device: torch.device
    ) -> list[object]:
        """`copy_ranges` of host arrays. What is returned must be kept until the work has run."""
        table = upload(torch.from_numpy(np.stack((sources, targets, lengths))), device)
        copy_ranges(table[0], table[1], table[2])
        return [table]

    def _codec(self, device: torch.device, stream: int) -> Any:
        """nvCOMP binds a codec to a device and a stream."""
        index = torch.cuda.current_device() if device.index is None else device.index
        if (index, stream) not in self._codecs:
            self._codecs[index, stream] = self._nvcomp.Codec(
                algorithm="Deflate",
                algorithm_type=self._algorithm,
                bitstream_kind=self._nvcomp.BitstreamKind.RAW,
                uncomp_chunk_size=MAX_UNIT_BYTES,
                device_id=index,
                cuda_stream=stream,
            )
        return self._codecs[index, stream]

    def _bound(self, codec: Any, raw: torch.Tensor) -> int:
        """Most bytes that one compressed unit can take, aligned for the next."""
        whole = torch.empty(MAX_UNIT_BYTES, dtype=torch.uint8, device=raw.device)
        bound = int(codec.get_max_comp_buffer_size(self._nvcomp.as_array(whole)))
        return -(-bound // _ALIGNMENT) * _ALIGNMENT


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
        raw = torch.frombuffer(bytearray(b"".join(streams)), dtype=torch.uint8).cuda()
        stored, body = device.compress(raw, lengths)
        units = tuple(Unit(whole, size) for whole, size in zip(lengths, stored, strict=True))
        return EncodedSection(units, body.cpu().numpy().tobytes())

    def decode(self, units: Sequence[Unit], body: memoryview, raw_length: int) -> bytearray:
        device = self._device
        if device is None:
            return decode_on_threads(units, body, raw_length)
        table = checked_table(units, body, raw_length)
        if not units:
            return bytearray()
        stored = torch.frombuffer(bytearray(body), dtype=torch.uint8).cuda()
        out = torch.empty(raw_length, dtype=torch.uint8, device=stored.device)
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
