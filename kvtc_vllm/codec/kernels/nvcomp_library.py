"""nvCOMP's C functions for batches of raw DEFLATE units, called through ctypes.

The Python interface of nvCOMP takes some three microseconds of the host for every unit, and waits
for the device with Python's lock held. A load has thousands of units. These functions take
arrays that already lie on the device, return at once, and report on each unit. Signatures are
those of nvCOMP 6's header `deflate.h`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

VERSION = 6
_ENTROPY_ONLY = 0
"""nvCOMP's fastest algorithm. On packed codes matches hardly ever help, the Huffman table does."""
_ON_MULTIPROCESSORS = 2
"""Decompression backend: the engine for it in some GPUs wants memory that it can reach."""
_SUCCESS = 0


class NvcompUnavailable(Exception):
    """nvCOMP cannot be used here; the text says why."""


class _CompressOptions(ctypes.Structure):
    _fields_ = [("algorithm", ctypes.c_int), ("reserved", ctypes.c_char * 60)]


class _DecompressOptions(ctypes.Structure):
    _fields_ = [
        ("backend", ctypes.c_int),
        ("sort_before_hw_decompress", ctypes.c_int),
        ("reserved", ctypes.c_char * 56),
    ]


_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_SIGNATURES: dict[str, list[Any]] = {
    "nvcompBatchedDeflateCompressGetMaxOutputChunkSize": [_SIZE, _CompressOptions, _POINTER],
    "nvcompBatchedDeflateCompressGetTempSize": [
        *(_SIZE, _SIZE, _CompressOptions, _POINTER, _SIZE, _POINTER)
    ],
    "nvcompBatchedDeflateCompressAsync": [
        *(_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE),
        *(_POINTER, _POINTER, _CompressOptions, _POINTER, _POINTER),
    ],
    "nvcompBatchedDeflateDecompressGetTempSize": [
        *(_SIZE, _SIZE, _DecompressOptions, _POINTER, _SIZE, _POINTER)
    ],
    "nvcompBatchedDeflateDecompressAsync": [
        *(_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE),
        *(_POINTER, _DecompressOptions, _POINTER, _POINTER),
    ],
}


class Batch(NamedTuple):
    """Units of one call. Arrays are int64 [n] on the device, but statuses: int32 [n]."""

    sources: torch.Tensor
    """Addresses."""
    source_bytes: torch.Tensor
    targets: torch.Tensor
    """Addresses."""
    target_bytes: torch.Tensor
    """Filled by the call: what every unit became."""
    statuses: torch.Tensor
    """Filled by the call: 0 where all went well."""
    largest: int
    """Raw bytes of the largest unit."""
    total: int
    """Raw bytes of all units, or more."""


class NvcompLibrary:
    """The functions of one loaded library. Any thread; calls do not wait for the device.

    library: what ctypes loaded. Arrays must stay until the stream has used them. Raises
    RuntimeError if a call is refused.
    """

    def __init__(self, library: Any) -> None:
        self._functions: dict[str, Callable[..., int]] = {}
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
            self._functions[name] = function
        self._compress = _CompressOptions(_ENTROPY_ONLY)
        self._decompress = _DecompressOptions(_ON_MULTIPROCESSORS)

    def max_compressed_bytes(self, size: int) -> int:
        """Room that each unit of a batch needs whose largest unit has `size` bytes."""
        most = _SIZE()
        self._call(
            "nvcompBatchedDeflateCompressGetMaxOutputChunkSize",
            *(size, self._compress, ctypes.byref(most)),
        )
        return most.value

    def compress(self, batch: Batch, stream: int) -> object:
        """Compress on a CUDA stream. What is returned must be kept until the work has run."""
        scratch = self._scratch("Compress", self._compress, batch, stream)
        self._call(
            "nvcompBatchedDeflateCompressAsync",
            batch.sources.data_ptr(),
            batch.source_bytes.data_ptr(),
            *(batch.largest, len(batch.sources)),
            *(scratch.data_ptr(), scratch.numel()),
            batch.targets.data_ptr(),
            batch.target_bytes.data_ptr(),
            self._compress,
            batch.statuses.data_ptr(),
            stream,
        )
        return scratch

    def decompress(self, batch: Batch, room: torch.Tensor, stream: int) -> object:
        """Decompress on a CUDA stream. room: int64 [n], bytes that each target may take.

        What is returned must be kept until the work has run.
        """
        scratch = self._scratch("Decompress", self._decompress, batch, stream)
        self._call(
            "nvcompBatchedDeflateDecompressAsync",
            batch.sources.data_ptr(),
            batch.source_bytes.data_ptr(),
            room.data_ptr(),
            batch.target_bytes.data_ptr(),
            len(batch.sources),
            *(scratch.data_ptr(), scratch.numel()),
            batch.targets.data_ptr(),
            self._decompress,
            batch.statuses.data_ptr(),
            stream,
        )
        return scratch

    def _scratch(self, way: str, options: Any, batch: Batch, stream: int) -> torch.Tensor:
        size = _SIZE()
        self._call(
            f"nvcompBatchedDeflate{way}GetTempSize",
            *(len(batch.sources), batch.largest, options, ctypes.byref(size), batch.total, stream),
        )
        return torch.empty(size.value, dtype=torch.uint8, device=batch.sources.device)

    def _call(self, name: str, *arguments: Any) -> None:
        status = self._functions[name](*arguments)
        if status != _SUCCESS:
            raise RuntimeError(f"{name} gave status {status}")


def load_nvcomp() -> NvcompLibrary:
    """Raises NvcompUnavailable without a GPU, nvCOMP, or its version 6."""
    if not torch.cuda.is_available():
        raise NvcompUnavailable("there is no CUDA device")
    try:
        from nvidia import libnvcomp
    except ImportError as error:
        message = f"nvCOMP is not installed ({error}); see the extras cu12, cu13"
        raise NvcompUnavailable(message) from error
    if libnvcomp.__version__.split(".")[0] != str(VERSION):
        raise NvcompUnavailable(f"nvCOMP {libnvcomp.__version__} is not version {VERSION}")
    library = libnvcomp.load_library()
    if library is None:
        raise NvcompUnavailable("nvCOMP's library cannot be loaded")
    try:
        return NvcompLibrary(library)
    except AttributeError as error:
        raise NvcompUnavailable(f"nvCOMP {libnvcomp.__version__}: {error}") from error
