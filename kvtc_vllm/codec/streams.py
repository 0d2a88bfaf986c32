"""CUDA streams and events beside the engine's; on a CPU, everything here does nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class Event:
    """A point in the work of the stream that is current when it is made."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        """The current stream goes on after this point; the host does not wait."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class SideStream:
    """A second stream, whose work runs beside that of the caller's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def after(self, *points: Event | None) -> Iterator[None]:
        """Run the block's work on this stream, after the given points; the host does not wait."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            for point in points:
                if point is not None:
                    point.wait()
            yield

    def adopt(self, *tensors: torch.Tensor) -> None:
        """Tell the allocator that this stream uses tensors made on another."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Wait on the host until the stream's work has run."""
        if self._stream is not None:
            self._stream.synchronize()


def host_buffer(size: int, device: torch.device) -> torch.Tensor:
    """uint8 [size] on the host, from which copies to `device` do not wait."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a small host tensor to `device` without waiting for the work before it."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
