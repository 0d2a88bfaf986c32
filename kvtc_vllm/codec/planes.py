"""Byte planes: the high bytes of all elements together, then the next lower, ...

High bytes (sign and exponent) are alike from element to element and low bytes
are noise; apart, the first compress and the second are stored. Bytes are
numbered as in memory on a little-endian host, the only kind supported.
"""

from __future__ import annotations

import torch


def to_bytes(x: torch.Tensor) -> bytes:
    """The elements of any tensor in C order, each as it lies in memory."""
    return x.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def split_planes(x: torch.Tensor) -> list[bytes]:
    """Planes of x in C order, highest byte first: x.itemsize streams of x.numel() bytes."""
    planes = x.contiguous().view(torch.uint8).reshape(-1, x.dtype.itemsize)
    return [to_bytes(planes[:, i]) for i in reversed(range(x.dtype.itemsize))]


def join_planes(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `split_planes`: uint8 [itemsize * n], planes concatenated -> dtype [n]."""
    planes = data.view(dtype.itemsize, -1).flip(0)
    return planes.T.contiguous().flatten().view(dtype)
