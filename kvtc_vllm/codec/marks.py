"""Which coded tokens of a chunk are marked as sinks, as a blob stores it: a bitmap.

Token i is bit i % 8 of byte i // 8, bit 0 being the least significant. Padding bits are zero.
"""

from __future__ import annotations

import numpy as np
import torch

from kvtc_vllm.codec.errors import ContainerError


def marks_length(tokens: int) -> int:
    """Bytes of the bitmap of so many tokens."""
    return (tokens + 7) // 8


def pack_marks(marks: torch.Tensor) -> bytes:
    """marks: bool [T], on any device."""
    return np.packbits(marks.cpu().numpy(), bitorder="little").tobytes()


def unpack_marks(bitmap: bytes | bytearray, tokens: int) -> torch.Tensor:
    """Inverse of `pack_marks`: bool [tokens] on the CPU. bitmap: `marks_length(tokens)` bytes.

    Raises ContainerError("bounds") if a padding bit is set.
    """
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
    if bits[tokens:].any():
        raise ContainerError("bounds", "padding after the marks is not zero")
    return torch.from_numpy(bits[:tokens].astype(np.bool_))
