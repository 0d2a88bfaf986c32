"""One name's directory on disk, as a worker sees it: opened when needed, left with its name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from kvtc_vllm.tiers.disk import DiskError, DiskStore, IoPool
from kvtc_vllm.tiers.inventory import Inventory
from kvtc_vllm.tiers.keys import RecordKey

T = TypeVar("T")

START_SECONDS = 120.0
"""For finding what is on disk when the engine starts."""


def open_in_time(namespace: Namespace) -> None:
    """Open at the engine's start. Raises DiskError if the directory can't be used in time."""
    pool = IoPool(1, 0, "kvtc-disk-open")
    opening = partial(_patiently, namespace.open, time.monotonic() + START_SECONDS)
    try:
        pool.submit(opening, START_SECONDS).wait()
    finally:
        pool.close(0.0)


def _patiently(call: Callable[[], T], until: float) -> T:
    """Repeat while the root is busy: engines that start together wait for each other's scans."""
    while True:
        try:
            return call()
        except DiskError as error:
            if error.reason != "busy" or time.monotonic() >= until:
                raise


class Namespace:
    """A store that is opened by the first thread that needs it.

    open_store: raises DiskError. own: no other engine can name it, so it goes with its
    generation.
    """

    def __init__(self, open_store: Callable[[], DiskStore], own: bool = False) -> None:
        self._open = open_store
        self.own = own
        self._store: DiskStore | None = None
        self._lock = threading.Lock()

    @property
    def store(self) -> DiskStore:
        """The open store, see `open`."""
        return self.open()

    def open(self) -> DiskStore:
        """Open it, unless it is. Uses the disk the first time; raises DiskError."""
        with self._lock:
            if self._store is None:
                self._store = self._open()
            return self._store

    def leave(self) -> None:
        """Close it, and remove what nobody can name from now on. Uses the disk."""
        with self._lock:
            if self._store is None:
                return
            if self.own:
                self._store.drop()
            self._store.close()

    def listed(self, until: float) -> Inventory:
        """Key and bytes of every chunk, least recently used first. Uses the disk."""
        return _patiently(self.store.inventory, until)

    def read(self, key: RecordKey) -> bytes:
        """A chunk, verified. Uses the disk; raises DiskError."""
        return self.store.read(key)

    def remove(self, keys: Sequence[RecordKey]) -> None:
        """Delete chunks. Uses the disk; raises DiskError."""
        self.store.remove(keys)

    def keep_list(self, until: float) -> None:
        """Write down what is known of the files, for the next start. Uses the disk.

        Given up at `until`, on the monotonic clock. Raises DiskError.
        """
        if not self.own:
            self.store.keep_list(until)
