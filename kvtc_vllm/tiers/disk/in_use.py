"""The mark of a namespace that somebody has open: a shared flock on a file of its own.

Any number of stores, ranks and processes share it. The kernel frees it when its process
dies. It only tells `kvtc gc` what to leave alone, so a store works without it too.
"""

from __future__ import annotations

import os
import threading
import time

from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.layout import IN_USE_FILE

_TRIES = 100
_PAUSE_SECONDS = 0.001
"""Whoever asks whether a namespace is in use holds the exclusive lock for an instant."""


class InUseMark:
    """One store's part of the mark on the namespace in `directory`. Thread-safe.

    Raises nothing: what cannot be marked stays unmarked.
    """

    def __init__(self, fs: CheckedFileSystem, directory: str) -> None:
        self._fs = fs
        self._path = f"{directory}/{IN_USE_FILE}"
        self._mutex = threading.Lock()
        self._fd: int | None = None
        self._closed = False

    def set(self) -> None:
        """Mark the directory that is there now; release an earlier mark."""
        self._put(self._take())

    def clear(self) -> None:
        """Release the mark; `set` may mark again."""
        self._put(None)

    def close(self) -> None:
        """Release the mark; `set` marks nothing any more."""
        with self._mutex:
            self._closed = True
        self._put(None)

    def _put(self, fd: int | None) -> None:
        # No call to the file system under the mutex: it may hang for ever.
        with self._mutex:
            if self._closed:
                unused, fd = [self._fd, fd], None
            else:
                unused = [self._fd]
            self._fd = fd
        for old in unused:
            if old is not None:
                self._fs.close_quietly(old)

    def _take(self) -> int | None:
        try:
            fd = self._fs.open(self._path, os.O_RDWR | os.O_CREAT)
        except DiskError:
            return None
        if self._lock(fd):
            return fd
        self._fs.close_quietly(fd)
        return None

    def _lock(self, fd: int) -> bool:
        try:
            for _ in range(_TRIES):
                if self._fs.try_lock_shared(fd):
                    return True
                time.sleep(_PAUSE_SECONDS)
        except DiskError:
            pass
        return False


def is_in_use(fs: CheckedFileSystem, directory: str) -> bool:
    """True while a living process has the namespace marked, and if that cannot be told."""
    try:
        fd = fs.open(f"{directory}/{IN_USE_FILE}", os.O_RDWR)
    except DiskError as error:
        return error.reason != "missing"
    try:
        return not fs.try_lock(fd)
    except DiskError:
        return True
    finally:
        fs.close_quietly(fd)
