"""Byte shuffle: the highest bytes of all elements together, then the next lower, ...

High bytes (sign and exponent) are alike from element to element and low bytes are noise; apart,
the first compress and the second are stored. Bytes are numbered as in memory on a little-endian
host, which is the only host supported.
"""

from __future__ import annotations

import torch


def to_bytes(x: torch.Tensor) -> bytes:
    """The elements of any tensor in C order, each as it lies in memory."""
    return x.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def shuffle(x: torch.Tensor) -> list[bytes]:
    """Byte shuffle of x in C order, highest byte first: x.itemsize streams of x.numel() bytes."""
    columns = x.contiguous().view(torch.uint8).reshape(-1, x.dtype.itemsize)
    return [to_bytes(columns[:, i]) for i in reversed(range(x.dtype.itemsize))]


def unshuffle(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `shuffle`: uint8 [itemsize * n], streams concatenated -> dtype [n]."""
    streams = data.view(dtype.itemsize, -1).flip(0)
    return streams.T.contiguous().flatten().view(dtype)
