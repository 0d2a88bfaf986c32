"""The shared account of a root: bytes and hits per namespace, and the root's lock.

The lock is the flock of the ledger's own file, so a dead process never holds it. It
excludes processes; a mutex in front of it excludes the threads of this one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec

from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.layout import BLOCK_BYTES, LEDGER_FILE, disk_bytes

LOCK_WAIT_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.0002
_LONGEST_PAUSE_SECONDS = 0.005


class Account(msgspec.Struct):
    """One namespace. used: bytes of its chunks and temporaries. hits: verified reads."""

    used: int = 0
    hits: int = 0


class LedgerState:
    """What the ledger says while its lock is held.

    accounts: by directory name of the namespace. known: False if the file was new or
    unreadable, so that the root must be counted before anything else is decided.
    """

    def __init__(self, fs: CheckedFileSystem, fd: int) -> None:
        self._fs = fs
        self._fd = fd
        self._size = fs.fstat(fd).size
        self._saved = fs.read_all(fd, self._size)
        self.accounts: dict[str, Account] = {}
        self.known = False
        with suppress(msgspec.DecodeError):
            self.accounts = msgspec.json.decode(self._saved, type=dict[str, Account])
            self.known = True

    @property
    def used(self) -> int:
        """Bytes of the whole root."""
        return sum(account.used for account in self.accounts.values())

    def account(self, namespace: str) -> Account:
        """The namespace's account, made if new."""
        return self.accounts.setdefault(namespace, Account())

    def save(self) -> None:
        """Write the accounts if they are known and changed. Raises DiskError.

        The file is padded to whole blocks and never shrinks: one write over allocated
        space, which a kill cannot tear and a full disk cannot refuse.
        """
        if not self.known:
            return
        content = msgspec.json.encode(self.accounts)
        content = content.ljust(max(disk_bytes(len(content)), self._size, BLOCK_BYTES))
        if content != self._saved:
            self._fs.write_all(self._fd, content)
            self._saved, self._size = content, len(content)


class Ledger:
    """Opens, locks and saves the ledger of `root`. Thread-safe; keeps one descriptor."""

    def __init__(
        self, fs: CheckedFileSystem, root: str, wait_seconds: float = LOCK_WAIT_SECONDS
    ) -> None:
        self._fs = fs
        self._path = f"{root}/{LEDGER_FILE}"
        self._wait = wait_seconds
        self._mutex = threading.Lock()
        self._fd: int | None = None

    @contextmanager
    def locked(self) -> Iterator[LedgerState]:
        """Hold the root's lock; save what the block changed, also if the block raises.

        Raises DiskError "busy" if the lock cannot be had in time, and any of the file system.
        """
        deadline = time.monotonic() + self._wait
        if not self._mutex.acquire(timeout=self._wait):
            raise DiskError("busy", f"{self._path} is in use by this process")
        try:
            fd = self._lock(deadline)
            try:
                ledger = LedgerState(self._fs, fd)
                try:
                    yield ledger
                except BaseException:
                    with suppress(DiskError):
                        ledger.save()
                    raise
                ledger.save()
            finally:
                self._unlock(fd)
        finally:
            self._mutex.release()

    def close(self) -> None:
        """Free the descriptor, unless a thread of this process has it and does not come back."""
        if self._mutex.acquire(timeout=self._wait):
            self._drop()
            self._mutex.release()

    def _lock(self, deadline: float) -> int:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            if self._fd is None:
                self._fd = self._fs.open(self._path, os.O_RDWR | os.O_CREAT)
            if self._try_lock(self._fd):
                return self._fd
            if self._fd is not None:
                if time.monotonic() > deadline:
                    raise DiskError("busy", f"{self._path} is locked by another process")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _try_lock(self, fd: int) -> bool:
        """Lock the file that is at the path now; drops the descriptor if it is another."""
        try:
            if not self._fs.try_lock(fd):
                return False
            # Somebody may have deleted the directory: a lock on the old file excludes nobody.
            there = self._fs.stat(self._path)
            if there is not None and there.inode == self._fs.fstat(fd).inode:
                return True
        except DiskError:
            self._drop()
            raise
        self._drop()
        return False

    def _unlock(self, fd: int) -> None:
        try:
            self._fs.unlock(fd)
        except DiskError:
            self._drop()  # closing gives the lock back too

    def _drop(self) -> None:
        if self._fd is not None:
            self._fs.close_quietly(self._fd)
            self._fd = None
