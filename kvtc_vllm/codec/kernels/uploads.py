"""Blobs on their way to the device, which are verified where they are sent from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.entropy import aligned
from kvtc_vllm.codec.streams import DeviceThread


class UploadedBlobs:
    """The blobs of one load, side by side on the host in pinned memory, and on the device.

    views: as they came. starts: where each begins in `staged` and `on_device`.
    """

    def __init__(
        self,
        blobs: Sequence[memoryview],
        thread: DeviceThread,
        device: torch.device,
        on_device: bool,
        first: int = 0,
    ) -> None:
        """thread: whose host memory is used, from `first` on, until the copies have run.
        on_device: whether they are wanted there. Raises torch.OutOfMemoryError."""
        self.views = blobs
        self.starts = [0, *accumulate(aligned(len(blob)) for blob in blobs)]
        size = self.starts[-1] if on_device else 0
        self._host = thread.host(first + size)[first:]
        self.staged: npt.NDArray[np.uint8] = self._host.numpy()
        self.on_device = torch.empty(size, dtype=torch.uint8, device=device)

    def stage(self, index: int) -> memoryview:
        """Copy a blob into pinned memory, and give what lies there. On any thread.

        Its checksum is to be taken of that: it is what the device gets, and lies in the processor's
        cache, where the blob did not.
        """
        # numpy lets other threads run meanwhile, assignment to a slice of a memoryview does not.
        np.copyto(self._staged(index), np.frombuffer(self.views[index], np.uint8))
        return self._staged(index).data

    def sent(self, index: int) -> memoryview:
        """A blob as the device gets it; if it gets none, as it came."""
        return self._staged(index).data if self.on_device.numel() else self.views[index]

    def send(self, blobs: slice) -> None:
        """Copy staged neighbours on the current stream, without waiting for the device.

        Those between them that are not sound are copied, too, and nobody reads them.
        """
        part = slice(self.starts[blobs.start], self.starts[blobs.stop])
        self.on_device[part].copy_(self._host[part], non_blocking=True)

    def _staged(self, index: int) -> npt.NDArray[np.uint8]:
        first = self.starts[index]
        return self.staged[first : first + len(self.views[index])]
