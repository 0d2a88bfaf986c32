"""Byte shuffle: the highest bytes of all elements together, then the next lower, ...

High bytes (sign and exponent) are alike from element to element and low bytes are noise; apart,
the first compress and the second are stored. Bytes are numbered as in memory on a little-endian
host, which is the only host supported.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def to_bytes(x: torch.Tensor) -> bytes:
    """The elements of any tensor in C order, each as it lies in memory."""
    return _columns(x).tobytes()


def shuffle(x: torch.Tensor) -> list[bytes]:
    """Byte shuffle of x in C order, highest byte first: x.itemsize streams of x.numel() bytes."""
    columns = _columns(x)
    # The copy lets other threads run; `tobytes` of what is not contiguous does not, for .5 ms of
    # the sinks of an 8B model.
    return [columns[:, i].copy().tobytes() for i in reversed(range(x.dtype.itemsize))]


def unshuffle(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `shuffle`: uint8 [itemsize * n], streams concatenated -> dtype [n]."""
    streams = data.cpu().numpy().reshape(dtype.itemsize, -1)
    columns = np.empty((streams.shape[1], dtype.itemsize), np.uint8)
    # One by one: numpy takes six times as long for all at once, element by element.
    for place, stream in enumerate(streams[::-1]):
        columns[:, place] = stream
    return torch.from_numpy(columns).view(dtype).flatten().to(data.device)


def _columns(x: torch.Tensor) -> npt.NDArray[np.uint8]:
    """[elements, bytes of one]. By numpy: a few bytes are not worth torch's team of threads, for
    which this thread would wait where others are busy."""
    there: npt.NDArray[np.uint8] = x.detach().contiguous().view(torch.uint8).cpu().numpy()
    return there.reshape(-1, x.dtype.itemsize)
