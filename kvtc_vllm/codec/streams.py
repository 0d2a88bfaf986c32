"""CUDA streams, events and pinned memory beside the engine's; on a CPU, nothing waits or pins."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

RING_BYTES = 4 << 20
"""Pinned memory per thread for small uploads."""


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

    def synchronize(self) -> None:
        """Wait on the host, other Python threads run meanwhile."""
        if self._event is not None:
            self._event.synchronize()


class SideStream:
    """A second stream, whose work runs beside that of the caller's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def after(self, *points: Event | None) -> Iterator[None]:
        """Run the block's work on this stream, after the given points; the host does not wait.

        If the block raises, the host waits for what it has launched: its memory is free then.
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            try:
                for point in points:
                    if point is not None:
                        point.wait()
                yield
            except BaseException:
                self._stream.synchronize()
                raise

    @contextlib.contextmanager
    def to_end(self, *points: Event | None) -> Iterator[None]:
        """`after`, and the host waits until the block's work has run, however the block ends."""
        try:
            with self.after(*points):
                yield
        finally:
            self.synchronize()

    def adopt(self, *tensors: torch.Tensor) -> None:
        """Tell the allocator that this stream uses tensors made on another."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Wait on the host until the stream's work has run; other Python threads run meanwhile."""
        if self._stream is not None:
            self._stream.synchronize()


def host_buffer(size: int, device: torch.device) -> torch.Tensor:
    """uint8 [size] on the host, from which copies to `device` do not wait."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


class DeviceThread:
    """What a thread that works with a device has for itself: side streams, one of them for copies,
    and pinned memory for what goes to and fro."""

    def __init__(self, device: torch.device, host_bytes: int) -> None:
        self.stream = SideStream(device)
        self.copying = SideStream(device)
        self._device = device
        self._host_bytes = host_bytes
        self._host: torch.Tensor | None = None

    def host(self, size: int) -> torch.Tensor:
        """uint8 [size] in pinned memory, always the same.

        Allocates `host_bytes` the first time, and later only for more than that.
        """
        if self._host is None or size > self._host.numel():
            self._host = host_buffer(max(size, self._host_bytes), self._device)
        return self._host[:size]


class DeviceThreads:
    """A `DeviceThread` for every thread that asks; sharing one, they would wait for each other."""

    def __init__(self, device: torch.device, host_bytes: int = 0) -> None:
        self._device = device
        self._host_bytes = host_bytes
        self._local = threading.local()

    @property
    def mine(self) -> DeviceThread:
        """This thread's; made when first asked for."""
        found: DeviceThread | None = getattr(self._local, "own", None)
        if found is None:
            found = self._local.own = DeviceThread(self._device, self._host_bytes)
        return found


def synchronize(device: torch.device) -> None:
    """Wait on the host for the current stream; other Python threads run meanwhile."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class UploadRing:
    """Pinned memory that small host tensors cross on their way to a device. For one thread.

    Places are used again in their order, once the copy out of them has run.
    """

    def __init__(self, device: torch.device, size: int = RING_BYTES) -> None:
        self._device = device
        self._ring = host_buffer(size, device)
        self._next = 0
        self._busy: deque[tuple[int, int, Event]] = deque()

    def put(self, x: torch.Tensor) -> torch.Tensor:
        """x on the device, ordered on the current stream. x: contiguous, on the host."""
        if not x.numel():  # a view as bytes would be refused: numpy gives it strides of 0
            return torch.empty(x.shape, dtype=x.dtype, device=self._device)
        data = x.reshape(-1).view(torch.uint8)
        size = data.numel()
        if 2 * size > self._ring.numel():
            # Rare enough to pay for an allocation: a ring for the largest would be idle.
            return x.pin_memory().to(self._device, non_blocking=True)
        if self._next + size > self._ring.numel():
            self._next = 0
        first, end = self._next, self._next + size
        while self._busy and self._busy[0][0] < end and first < self._busy[0][1]:
            self._busy.popleft()[2].synchronize()
        place = self._ring[first:end]
        # torch would hand a copy of this size to a team of threads, and wait for it.
        np.copyto(place.numpy(), data.numpy())
        there = place.to(self._device, non_blocking=True, copy=True).view(x.dtype).view(x.shape)
        self._busy.append((first, end, Event(self._device)))
        # The next tensor begins where any dtype may.
        self._next = -(-end // 16) * 16
        return there


_RINGS = threading.local()


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a small host tensor to `device` without waiting for the work before it."""
    if device.type != "cuda":
        return x.to(device)
    rings: dict[torch.device, UploadRing] = _RINGS.__dict__.setdefault("by_device", {})
    if device not in rings:
        rings[device] = UploadRing(device)
    return rings[device].put(x)
