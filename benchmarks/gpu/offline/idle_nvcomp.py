"""nvCOMP's functions, with work that takes no time and gives units of a stated ratio."""

from __future__ import annotations

import torch

from kvtc_vllm.codec.kernels.nvcomp_library import Batch, NvcompLibrary

STORED = 0.68
"""Stored over raw bytes of a unit: what DEFLATE makes of the packed codes of `models`' data."""


class IdleNvcomp(NvcompLibrary):
    """Says that all went well. No byte of a unit is read or written."""

    def __init__(self) -> None:
        pass

    def max_compressed_bytes(self, size: int) -> int:
        """As nvCOMP 6.0.0.12."""
        return int(2.2624 * size) + 64

    def compress(self, batch: Batch, stream: int) -> object:
        batch.target_bytes.copy_((STORED * batch.source_bytes).long().clamp_min(1))
        return None

    def decompress(self, batch: Batch, room: torch.Tensor, stream: int) -> object:
        batch.target_bytes.copy_(room)
        return None
