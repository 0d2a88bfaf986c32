"""Use of chunks as modification times of their files, and files that are being written."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from kvtc_vllm.tiers.disk.checked import CheckedFileSystem

LATEST_NS = 400 * 86400 * 10**9
"""A time further ahead of the clock is no use of a chunk by anybody."""


@dataclass
class Temporary:
    """A reservation: a locked file of the final length that holds nothing yet.

    size: bytes it is entered with in the ledger.
    """

    path: str
    fd: int | None
    size: int

    @property
    def open_fd(self) -> int:
        """The descriptor, before it is closed."""
        assert self.fd is not None
        return self.fd


class Recency:
    """Writes the last use of chunks: the modification times of their files. Thread-safe."""

    def __init__(self, fs: CheckedFileSystem) -> None:
        self._fs = fs
        self._last = 0
        self._lock = threading.Lock()

    def seen(self, mtime_ns: int) -> None:
        """Stamp later than this from now on: the clock may have been set back since."""
        if mtime_ns < time.time_ns() + LATEST_NS:
            with self._lock:
                self._last = max(self._last, mtime_ns)

    def touch(self, path: str) -> None:
        """Stamp the file later than all that this process stamped or saw. Raises DiskError."""
        with self._lock:
            # The clock may stand still between two calls, and may be set back.
            self._last = max(time.time_ns(), self._last + 1)
            now = self._last
        self._fs.utime(path, now)
