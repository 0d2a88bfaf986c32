"""The shared account of a root: bytes and hits per namespace, and the root's lock.

The lock is the flock of the ledger's own file, so a dead process never holds it. It
excludes processes; a mutex in front of it excludes the threads of this one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

import msgspec
import xxhash
from msgspec import Meta

from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.layout import (
    BLOCK_BYTES,
    FAN_OUTS,
    LEDGER_FILE,
    disk_bytes,
    is_namespace,
)
from kvtc_vllm.tiers.disk.places import clear_place

LOCK_WAIT_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 0.005
"""Between two tries of whoever waits for the lock."""
MAX_LEDGER_BYTES = 2**24
"""A larger file is no ledger."""
NO_COUNT = -1

_FIRST_PAUSE_SECONDS = 0.0002
_Amount = Annotated[int, Meta(ge=0, le=2**62)]


class Account(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One namespace.

    A count goes through the fan-out directories in steps, and other processes change the
    namespace between them. Whoever does so in a directory that the count has passed changes
    `counted` too. So the count is exact at its end, and any process can go on with it.
    """

    used: _Amount = 0
    """Bytes of its chunks and temporaries, or more."""
    hits: _Amount = 0
    """Verified reads."""
    known: bool = True
    """False: `used` was lost, nothing is to be decided by it before a count has ended."""
    next: Annotated[int, Meta(ge=NO_COUNT, lt=FAN_OUTS)] = NO_COUNT
    """The fan-out directory that a count goes on with."""
    counted: _Amount = 0
    """Bytes in those before it."""

    def begin_count(self) -> None:
        """Count from the start."""
        self.next, self.counted = 0, 0

    def end_count(self, writing: int) -> None:
        """Take over the result. writing: bytes of the temporaries."""
        self.used, self.known = self.counted + writing, True
        self.next, self.counted = NO_COUNT, 0

    def published(self, fan_out: int, size: int) -> None:
        """A temporary, which `used` contains, became a chunk."""
        if fan_out < self.next:
            self.counted += size

    def removed(self, fan_out: int, size: int) -> None:
        """A chunk is gone."""
        if fan_out < self.next:
            self.counted = max(0, self.counted - size)
        self.released(size)

    def released(self, size: int) -> None:
        """Bytes are gone. If there were fewer, they are to be counted."""
        if size > self.used and self.known:  # else a count runs already
            self.known = False
            self.begin_count()
        self.used = max(0, self.used - size)


class _Content(msgspec.Struct, forbid_unknown_fields=True):
    checksum: str
    """XXH3-128 of the accounts in JSON, in hex."""
    accounts: dict[str, Account]


class LedgerState:
    """What the ledger says while its lock is held.

    accounts: by directory name of the namespace. damage: what is wrong with the file, which then
    says nothing; empty if it is sound or new.
    """

    def __init__(self, fs: CheckedFileSystem, fd: int) -> None:
        self._fs = fs
        self._fd = fd
        self._size = fs.fstat(fd).size
        self.damage = ""
        self.accounts: dict[str, Account] = {}
        self.readable = False
        if self._size > MAX_LEDGER_BYTES:
            self._saved = b""
            self.damage = f"{self._size} bytes are too many"
            return
        self._saved = fs.read_all(fd, self._size)
        try:
            self.accounts = _decode(self._saved)
            self.readable = True
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self.damage = str(error) if self._size else ""

    @property
    def known(self) -> bool:
        """Whether every account may be relied upon."""
        return self.readable and all(account.known for account in self.accounts.values())

    @property
    def used(self) -> int:
        """Bytes of the whole root."""
        return sum(account.used for account in self.accounts.values())

    def account(self, namespace: str) -> Account:
        """The namespace's account, made if new."""
        return self.accounts.setdefault(namespace, Account())

    def rebuild(self, namespaces: Iterable[str]) -> None:
        """Begin anew with these, all of which are to be counted."""
        self.accounts = {name: Account(known=False, next=0) for name in namespaces}
        self.readable = True

    def save(self) -> None:
        """Write the accounts if there are any to rely on and they changed. Raises DiskError.

        The file is padded to whole blocks and does not shrink, unless it was damaged: one write
        over allocated space, which a kill cannot tear and a full disk cannot refuse.
        """
        if not self.readable:
            return
        content = _encode(self.accounts)
        least = 0 if self.damage else self._size
        content = content.ljust(max(disk_bytes(len(content)), least, BLOCK_BYTES))
        if content != self._saved:
            self._fs.write_all(self._fd, content)
            if self._size > len(content):
                self._fs.truncate(self._fd, len(content))
            self._saved, self._size = content, len(content)


class Ledger:
    """Opens, locks and saves the ledger of `root`. Thread-safe; keeps one descriptor."""

    def __init__(
        self, fs: CheckedFileSystem, root: str, wait_seconds: float = LOCK_WAIT_SECONDS
    ) -> None:
        self._fs = fs
        self._root = root
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
                self._fd = self._open()
            if self._try_lock(self._fd):
                return self._fd
            if self._fd is not None:
                if time.monotonic() > deadline:
                    raise DiskError("busy", f"{self._path} is locked by another process")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _open(self) -> int:
        """Something else in the ledger's place goes first: nobody can have its lock."""
        flags = os.O_RDWR | os.O_CREAT
        try:
            fd = self._fs.open(self._path, flags)
        except DiskError as error:
            if error.reason != "foreign":
                raise
        else:
            try:
                if self._fs.fstat(fd).links <= 1:
                    return fd
            except DiskError:
                self._fs.close_quietly(fd)
                raise
            # What is written here would be written into somebody's file of another name.
            self._fs.close_quietly(fd)
        there = self._fs.stat(self._path)
        if there is not None and not (there.is_regular and there.links == 1):
            clear_place(self._fs, self._root, self._path)
        return self._fs.open(self._path, flags)

    def _try_lock(self, fd: int) -> bool:
        """Lock the file that is at the path now; drops the descriptor if it is another."""
        try:
            if not self._fs.try_lock(fd):
                return False
            # Somebody may have deleted the directory: a lock on the old file excludes nobody.
            there = self._fs.stat(self._path)
            mine = self._fs.fstat(fd)
            if there is not None and there.inode == mine.inode and mine.links == 1:
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


def _decode(content: bytes) -> dict[str, Account]:
    """Raises ValueError, RecursionError or one of msgspec's for anything that is not sound."""
    found = msgspec.json.decode(content, type=_Content)
    if found.checksum != _checksum(found.accounts):
        raise ValueError("the checksum does not fit the accounts")
    if not all(is_namespace(name) for name in found.accounts):
        raise ValueError("an account is of no namespace")
    return found.accounts


def _encode(accounts: dict[str, Account]) -> bytes:
    return msgspec.json.encode(_Content(_checksum(accounts), accounts))


def _checksum(accounts: dict[str, Account]) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(accounts))
