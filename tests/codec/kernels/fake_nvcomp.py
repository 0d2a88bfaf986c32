"""nvCOMP's Python interface, as its 6.0 docstrings describe it, over isal and host memory.

It shows that our side of the interface is used as documented. What nvCOMP really does is for the
tests marked `gpu`.
"""

from __future__ import annotations

import zlib
from enum import Enum

import numpy as np
import torch

__version__ = "6.0.0.12"


def worst(size: int) -> int:
    """Most bytes that a unit can take."""
    return 2 * size + 64


class BitstreamKind(Enum):
    RAW = 1


class BatchArray:
    """Views of one buffer."""

    def __init__(self, views: list[np.ndarray]) -> None:
        self.views = views
        self.sizes = [len(view) for view in views]

    @property
    def buffer_sizes(self) -> list[int]:
        """Of what was encoded: waits for the device, and no other Python thread runs meanwhile."""
        if pending:
            raise AssertionError("every thread of the process would stop here")
        return self.sizes


pending: list[BatchArray] = []
"""Encoded on the device, and nobody has waited for it yet."""


def device_is_done(device: torch.device) -> None:
    """What `streams.synchronize` does."""
    pending.clear()


def as_array(buffer: torch.Tensor, cuda_stream: int = 0) -> np.ndarray:
    assert cuda_stream
    return buffer.numpy()


def as_arrays(
    buffer: torch.Tensor, offsets: list[int], sizes: list[int], cuda_stream: int = 0
) -> BatchArray:
    assert cuda_stream
    assert all(type(number) is int for number in [*offsets, *sizes])
    assert all(o >= 0 and o + s <= buffer.numel() for o, s in zip(offsets, sizes, strict=True))
    data = buffer.numpy()
    return BatchArray([data[o : o + s] for o, s in zip(offsets, sizes, strict=True)])


class Codec:
    """Raw DEFLATE; decoding refuses unaligned input and other sizes than announced."""

    def __init__(self, **options: object) -> None:
        assert options["algorithm"] == "Deflate"
        assert options["bitstream_kind"] is BitstreamKind.RAW
        assert options["cuda_stream"]

    def get_max_comp_buffer_size(self, source: np.ndarray) -> int:
        return worst(len(source))

    def encode(self, sources: BatchArray, out: BatchArray) -> BatchArray:
        for index, (source, target) in enumerate(zip(sources.views, out.views, strict=True)):
            assert len(target) >= worst(len(source))
            deflater = zlib.compressobj(6, zlib.DEFLATED, -15)
            stored = deflater.compress(source.tobytes()) + deflater.flush()
            target[: len(stored)] = np.frombuffer(stored, np.uint8)
            out.sizes[index] = len(stored)
        pending.append(out)
        return out

    def compression_config(self, sizes: list[int]) -> list[int]:
        return sizes

    def decompression_config(self, config: list[int]) -> list[int]:
        return config

    def decode(
        self, sources: BatchArray, out: BatchArray, decompression_config: list[int]
    ) -> BatchArray:
        assert out.sizes == decompression_config
        for source, target in zip(sources.views, out.views, strict=True):
            assert source.ctypes.data % 4 == 0
            target[:] = np.frombuffer(zlib.decompress(source.tobytes(), -15), np.uint8)
        return out
