"""How fast threads work through a queue, also while a piece of it hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Pace:
    """Of what ended since the last time, and of the piece that runs and is the slowest so far."""

    ended: int = 0
    """Amount of work."""
    seconds: float = 0.0
    """That it took, with as many threads as could work at it."""
    running: int = 0
    """Amount of the piece that runs; 0 if none does."""
    running_seconds: float = 0.0
    """That it has taken so far, in the same measure."""

    def join(self, other: Pace) -> None:
        """Add what another rank did in the same time."""
        self.ended += other.ended
        self.seconds += other.seconds
        if other.running_seconds * self.running >= self.running_seconds * other.running:
            self.running, self.running_seconds = other.running, other.running_seconds

    def __bool__(self) -> bool:
        return bool(self.ended or self.running)


@dataclass(eq=False)
class Piece:
    """Work of one thread."""

    amount: int
    threads: int
    """That work at the whole of which it is a part."""
    began: float
    """On the monotonic clock."""
    counts: bool = False
    """Set it once the work was done well: what failed says nothing about the pace."""


class PaceMeter:
    """Measures pieces of work. Safe for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[Piece] = set()
        self._pace = Pace()

    @contextmanager
    def piece(self, amount: int, threads: int) -> Iterator[Piece]:
        """Take the time of a piece of work."""
        piece = Piece(amount, threads, time.monotonic())
        with self._lock:
            self._running.add(piece)
        try:
            yield piece
        finally:
            with self._lock:
                self._running.discard(piece)
                if piece.counts:
                    self._pace.ended += amount
                    self._pace.seconds += (time.monotonic() - piece.began) / threads

    def take(self) -> Pace:
        """The pace since the last call."""
        now = time.monotonic()
        with self._lock:
            pace, self._pace = self._pace, Pace()
            for piece in self._running:
                pace.join(Pace(0, 0.0, piece.amount, (now - piece.began) / piece.threads))
        return pace
