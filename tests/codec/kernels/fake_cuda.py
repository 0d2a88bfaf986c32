"""torch.cuda's streams and events, which only tell what happens to them, and in which order."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch

CUDA = torch.device("cuda")


class FakeCuda:
    """log: (stream, what) as it happens, by any thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str]] = []
        self._numbers = count()
        self._local = threading.local()
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(self, "side"))
        monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "stream", self._entered)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    def number(self) -> int:
        return next(self._numbers)

    @property
    def current(self) -> FakeStream:
        """This thread's."""
        if not hasattr(self._local, "current"):
            self._local.current = FakeStream(self, "default")
        return self._local.current

    def launch(self, what: str) -> None:
        """Note work on the current stream."""
        self.log.append((self.current.name, what))

    @contextlib.contextmanager
    def _entered(self, stream: FakeStream) -> Iterator[None]:
        before, self._local.current = self.current, stream
        try:
            yield
        finally:
            self._local.current = before


class FakeStream:
    def __init__(self, cuda: FakeCuda, kind: str) -> None:
        self._cuda = cuda
        self.cuda_stream = 0 if kind == "default" else 1 + cuda.number()
        self.name = kind if kind == "default" else f"{kind} {self.cuda_stream}"

    def synchronize(self) -> None:
        self._cuda.log.append((self.name, "synchronize"))

    def wait_event(self, event: Any) -> None:
        self._cuda.log.append((self.name, f"wait for {event.name}"))


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.name = f"event {cuda.number()}"

    def record(self) -> None:
        self._cuda.log.append((self._cuda.current.name, f"record {self.name}"))

    def synchronize(self) -> None:
        self._cuda.log.append(("host", f"wait for {self.name}"))
