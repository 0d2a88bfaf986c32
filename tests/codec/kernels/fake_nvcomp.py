"""nvCOMP's C functions, as its 6.0 header describes them, over isal and host memory.

It shows that our side of the interface is used as documented. What nvCOMP really does is for the
tests marked `gpu`.
"""

from __future__ import annotations

import ctypes
import zlib
from itertools import pairwise
from typing import Any

from kvtc_vllm.codec.kernels.nvcomp_library import NvcompLibrary

CANNOT_DECOMPRESS = 12
_OUTPUT_ALIGNMENT, _INPUT_ALIGNMENT = 8, 4


def worst(size: int) -> int:
    """Most bytes that a unit can take."""
    return 2 * size + 64


def _numbers(address: int, count: int, kind: Any = ctypes.c_int64) -> Any:
    return (kind * count).from_address(address)


class _Function:
    """What ctypes gives for a name: it takes plain numbers here."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.argtypes: list[Any] = []
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> int:
        assert len(arguments) == len(self.argtypes)
        self._call(*arguments)
        return 0


class FakeLibrary:
    """Raw DEFLATE. Whatever reads its results waits for the device first, as with the real one.

    calls: the functions that were called, by name.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        for way in ("Compress", "Decompress"):
            self._add(f"nvcompBatchedDeflate{way}GetTempSize", self._no_temporary_memory)
        self._add("nvcompBatchedDeflateCompressGetMaxOutputChunkSize", self._most)
        self._add("nvcompBatchedDeflateCompressAsync", self._compress)
        self._add("nvcompBatchedDeflateDecompressAsync", self._decompress)

    def _add(self, name: str, call: Any) -> None:
        def noted(*arguments: Any) -> None:
            self.calls.append(name)
            call(*arguments)

        setattr(self, name, _Function(noted))

    @staticmethod
    def _no_temporary_memory(
        count: int, largest: int, options: Any, out: Any, total: int, stream: int
    ) -> None:
        assert count > 0
        out._obj.value = 0

    @staticmethod
    def _most(size: int, options: Any, out: Any) -> None:
        out._obj.value = worst(size)

    @staticmethod
    def _compress(
        sources: int,
        lengths: int,
        largest: int,
        count: int,
        scratch: int,
        scratch_bytes: int,
        targets: int,
        stored: int,
        options: Any,
        statuses: int,
        stream: int,
    ) -> None:
        assert options.algorithm == 0
        assert bytes(options.reserved) == b""
        places = _numbers(targets, count)
        # Every output needs room for the worst of the batch's largest unit.
        room = worst(largest)
        ordered = sorted(places)
        assert all(b - a >= room for a, b in pairwise(ordered))
        for index, (source, length) in enumerate(
            zip(_numbers(sources, count), _numbers(lengths, count), strict=True)
        ):
            assert 0 < length <= largest
            assert places[index] % _OUTPUT_ALIGNMENT == 0
            deflater = zlib.compressobj(6, zlib.DEFLATED, -15)
            data = deflater.compress(ctypes.string_at(source, length)) + deflater.flush()
            ctypes.memmove(places[index], data, len(data))
            _numbers(stored, count)[index] = len(data)
            _numbers(statuses, count, ctypes.c_int32)[index] = 0

    @staticmethod
    def _decompress(
        sources: int,
        lengths: int,
        rooms: int,
        found: int,
        count: int,
        scratch: int,
        scratch_bytes: int,
        targets: int,
        options: Any,
        statuses: int,
        stream: int,
    ) -> None:
        assert options.backend == 2, "the engine of some GPUs cannot reach torch's memory"
        for index, (source, length, target, room) in enumerate(
            zip(
                *(_numbers(each, count) for each in (sources, lengths, targets, rooms)), strict=True
            )
        ):
            assert source % _INPUT_ALIGNMENT == 0
            inflater = zlib.decompressobj(-15)
            try:
                data = inflater.decompress(ctypes.string_at(source, length), room)
            except zlib.error:
                data = b""
            whole = bool(data) and (inflater.eof or not inflater.unconsumed_tail)
            ctypes.memmove(target, data, len(data))
            _numbers(found, count)[index] = len(data)
            status = 0 if whole else CANNOT_DECOMPRESS
            _numbers(statuses, count, ctypes.c_int32)[index] = status


def library() -> NvcompLibrary:
    """Our side of the interface over a `FakeLibrary`."""
    return NvcompLibrary(FakeLibrary())
