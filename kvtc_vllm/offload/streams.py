"""Ordering between the engine's compute stream and our threads.

On CPU there is one memory and no stream, so everything here does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class SideStream:
    """A stream of our own beside the engine's, for one thread pool."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> torch.cuda.Event | None:
        """Record a point on the current (compute) stream; called by the engine's thread."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    @contextlib.contextmanager
    def after(self, point: torch.cuda.Event | None) -> Iterator[None]:
        """Run the block's kernels on this stream after `point`, and wait for them at its end."""
        if self._stream is None or point is None:
            yield
            return
        self._stream.wait_event(point)
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def adopt(self, *tensors: torch.Tensor) -> None:
        """Tell the allocator that this stream uses tensors made on another."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)
