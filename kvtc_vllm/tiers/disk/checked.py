"""The one exception of the disk tier, and a file system that raises nothing else."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, ParamSpec, TypeVar, get_args

from kvtc_vllm.tiers.blob_store import StoreError
from kvtc_vllm.tiers.disk.filesystem import FileInfo, FileSystem, Listed, Named

P = ParamSpec("P")
T = TypeVar("T")

INTERRUPTED_TRIES = 100
"""A call interrupted this often in a row is given up."""


DiskReason = Literal[
    "missing",
    "no_space",
    "io",
    "too_many_files",
    "read_only",
    "permission",
    "unsupported",
    "interrupted",
    "other",
    "corrupt",
    "foreign",
    "representative",
    "full",
    "busy",
    "layout",
    "key",
    "closed",
    "deadline",
    "queue_full",
    "stalled",
]
DISK_REASONS: tuple[DiskReason, ...] = get_args(DiskReason)
"""All reasons of a `DiskError`."""

_REASONS: dict[int, DiskReason] = {
    errno.ENOENT: "missing",
    errno.ENOTDIR: "missing",
    errno.ENOSPC: "no_space",
    errno.EDQUOT: "no_space",
    errno.EFBIG: "no_space",
    errno.EIO: "io",
    errno.ESTALE: "io",
    errno.ENXIO: "io",
    errno.ENODEV: "io",
    errno.ETIMEDOUT: "io",
    errno.EMFILE: "too_many_files",
    errno.ENFILE: "too_many_files",
    errno.ENOMEM: "too_many_files",
    errno.EROFS: "read_only",
    errno.EACCES: "permission",
    errno.EPERM: "permission",
    errno.EEXIST: "foreign",
    errno.EISDIR: "foreign",
    errno.ELOOP: "foreign",
    errno.ENOLCK: "unsupported",
    errno.ENOSYS: "unsupported",
    errno.EOPNOTSUPP: "unsupported",
}


class DiskError(StoreError):
    """A disk operation did not happen.

    `reason` is one of `DISK_REASONS`; the package's docstring says what each means.
    """

    reason: DiskReason

    def __init__(self, reason: DiskReason, message: str) -> None:
        super().__init__(reason, message)

    @classmethod
    def from_os(cls, error: OSError, call: str) -> DiskError:
        """The reason of an operating system error; `call` names what was attempted."""
        reason = _REASONS.get(error.errno or 0, "other")
        return cls(reason, f"{call}: {error.strerror or error}")


class CheckedFileSystem:
    """The calls of a FileSystem, repeated while interrupted; all raise DiskError only.

    Called from any thread. In a child of a fork every call raises "closed": its copies of the
    descriptors are closed there, or the parent's locks would outlive it.
    """

    def __init__(self, filesystem: FileSystem) -> None:
        self._raw = filesystem
        self._open: set[int] = set()
        self._left_behind = False
        _all.add(self)

    def open(self, path: str, flags: int) -> int:
        """Descriptor of a plain file. Raises "foreign" if something else is there."""
        try:
            fd = self._call(f"open {path}", self._raw.open, path, flags)
        except DiskError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno == errno.ENXIO:  # a socket
                raise DiskError("foreign", f"open {path}: it is no plain file") from cause
            raise
        self._open.add(fd)
        return fd

    def close(self, fd: int) -> None:
        """Free the descriptor. Raises if the file system reports a late write error."""
        self._open.discard(fd)
        self._call("close", self._close, fd)

    def close_quietly(self, fd: int) -> None:
        """Free the descriptor, ignoring errors: nothing may depend on what was written."""
        with suppress(DiskError):
            self.close(fd)

    def read_all(self, fd: int, length: int, offset: int = 0) -> bytes:
        """Read exactly `length` bytes from `offset` on. Raises "corrupt" if there are fewer."""
        parts: list[bytes] = []
        have = 0
        while have < length:
            part = self._call("read", self._raw.pread, fd, length - have, offset + have)
            if not part:
                raise DiskError("corrupt", f"{have} bytes where {length} were expected")
            parts.append(part)
            have += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write_all(self, fd: int, data: bytes, offset: int = 0) -> None:
        """Write `data` from `offset` on."""
        view = memoryview(data)
        done = 0
        while done < len(view):
            written = self._call("write", self._raw.pwrite, fd, view[done:], offset + done)
            if written <= 0:
                raise DiskError("io", "write made no progress")
            done += written

    def truncate(self, fd: int, size: int) -> None:
        self._call("truncate", self._raw.truncate, fd, size)

    def fstat(self, fd: int) -> FileInfo:
        return self._call("fstat", self._raw.fstat, fd)

    def stat(self, path: str) -> FileInfo | None:
        """What is at a path; None if nothing is."""
        try:
            return self._call(f"stat {path}", self._raw.stat, path)
        except DiskError as error:
            _reraise_unless_missing(error)
            return None

    def _list(self, path: str, call: Callable[[str], list[T]]) -> list[T]:
        try:
            return self._call(f"list {path}", call, path)
        except DiskError as error:
            _reraise_unless_missing(error)
            return []

    def names(self, path: str) -> list[Named]:
        """Names and inodes of a directory's plain files; none if there is no such directory."""
        return self._list(path, self._raw.names)

    def list(self, path: str) -> list[Listed]:
        """Entries of a directory; none if there is no such directory."""
        return self._list(path, self._raw.list)

    def mkdir(self, path: str) -> None:
        self._call(f"mkdir {path}", self._raw.mkdir, path)

    def rmdir(self, path: str) -> None:
        self._call(f"rmdir {path}", self._raw.rmdir, path)

    def rename(self, source: str, target: str) -> None:
        self._call(f"rename to {target}", self._raw.rename, source, target)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name. Raises "foreign" if something has it."""
        self._call(f"link to {target}", self._raw.link, source, target)

    def unlink(self, path: str) -> bool:
        """Remove a file; False if there was none."""
        try:
            self._call(f"unlink {path}", self._raw.unlink, path)
        except DiskError as error:
            _reraise_unless_missing(error)
            return False
        return True

    def utime(self, path: str, time_ns: int) -> None:
        self._call(f"utime {path}", self._raw.utime, path, time_ns)

    def free_bytes(self, path: str) -> int:
        return self._call(f"statvfs {path}", self._raw.free_bytes, path)

    def try_lock(self, fd: int) -> bool:
        return self._call("flock", self._raw.try_lock, fd)

    def try_lock_shared(self, fd: int) -> bool:
        return self._call("flock", self._raw.try_lock_shared, fd)

    def unlock(self, fd: int) -> None:
        self._call("flock", self._raw.unlock, fd)

    def _close(self, fd: int) -> None:
        # Linux frees the descriptor even if close is interrupted: a second one could
        # close somebody else's.
        with suppress(InterruptedError):
            self._raw.close(fd)

    def _call(self, name: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._left_behind:
            raise DiskError("closed", f"{name}: opened by another process, before a fork")
        for _ in range(INTERRUPTED_TRIES):
            try:
                return call(*args, **kwargs)
            except InterruptedError:
                continue
            except OSError as error:
                raise DiskError.from_os(error, name) from error
            except ValueError as error:  # a NUL or a surrogate in a path
                raise DiskError("other", f"{name}: {error}") from error
        raise DiskError("interrupted", name)

    def leave_behind(self) -> None:
        """Close all descriptors and refuse every further call. In the child of a fork."""
        self._left_behind = True
        for fd in self._open:
            with suppress(OSError):
                os.close(fd)
        self._open.clear()


_all: weakref.WeakSet[CheckedFileSystem] = weakref.WeakSet()


def _after_fork() -> None:
    for filesystem in list(_all):
        filesystem.leave_behind()


os.register_at_fork(after_in_child=_after_fork)


def _reraise_unless_missing(error: DiskError) -> None:
    if error.reason != "missing":
        raise error
