"""nvCOMP's Python interface, with work that takes no time and gives units of a stated ratio."""

from __future__ import annotations

from enum import Enum
from typing import Any

STORED = 0.68
"""Stored over raw bytes of a unit: what DEFLATE makes of the packed codes of `models`' data."""
__version__ = "6.0.0.12"


class BitstreamKind(Enum):
    RAW = 1


class _Arrays:
    def __init__(self, sizes: list[int]) -> None:
        self.buffer_sizes = sizes


def as_array(buffer: Any, cuda_stream: int = 0) -> int:
    """Its length."""
    return len(buffer)


def as_arrays(buffer: Any, offsets: list[int], sizes: list[int], cuda_stream: int = 0) -> _Arrays:
    """Their lengths."""
    return _Arrays(sizes)


class Codec:
    """Raw DEFLATE."""

    def __init__(self, **options: object) -> None:
        pass

    def get_max_comp_buffer_size(self, size: int) -> int:
        """As nvCOMP 6.0.0.12 for this algorithm."""
        return int(2.2624 * size) + 64

    def encode(self, source: _Arrays, out: _Arrays) -> _Arrays:
        """Sizes in the order of the units."""
        return _Arrays([max(1, int(STORED * size)) for size in source.buffer_sizes])

    def compression_config(self, sizes: list[int]) -> list[int]:
        """Nothing to be configured."""
        return sizes

    def decompression_config(self, config: list[int]) -> list[int]:
        """Nothing to be configured."""
        return config

    def decode(self, source: _Arrays, out: _Arrays, decompression_config: list[int]) -> _Arrays:
        """No byte is written."""
        return out
