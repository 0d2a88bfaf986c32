"""Every call that the disk tier makes to the operating system, and nothing else.

Fault injection and hung disks are made by wrapping exactly this.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from stat import S_IMODE, S_ISDIR, S_ISREG
from typing import NamedTuple, Protocol, TypeVar

T = TypeVar("T")

Listed = tuple[str, int, int, int]
"""One entry of a directory: name, mode (with the file's type), size in bytes, modification time
in nanoseconds since the epoch. A plain tuple, because there are hundreds of thousands."""

Named = tuple[str, int]
"""One file of a directory: name and inode."""

_DIRECTORY = os.O_DIRECTORY | os.O_CLOEXEC
_WRITABLE_BY_OTHERS = 0o022


class FileInfo(NamedTuple):
    """One file. size: bytes. mtime_ns: last modification, nanoseconds since the epoch.

    mode: with the file's type. links: names that the file has.
    """

    size: int
    mtime_ns: int
    inode: int
    mode: int
    links: int

    @property
    def is_regular(self) -> bool:
        """Whether it is a plain file: no link, directory, pipe, socket or device."""
        return S_ISREG(self.mode)


class FileSystem(Protocol):
    """POSIX calls by path or descriptor. All may raise OSError; called from any thread."""

    def open(self, path: str, flags: int) -> int:
        """Descriptor of a plain file, close-on-exec; new ones get mode 0600.

        Never follows a symbolic link and never waits for the other end of a pipe. What is no
        plain file raises OSError with EISDIR, ELOOP or ENXIO.
        """
        ...

    def close(self, fd: int) -> None:
        """Free the descriptor (also if this raises) and its lock."""
        ...

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """Up to `length` bytes; fewer is not the end, none is."""
        ...

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """Bytes written, perhaps fewer than given."""
        ...

    def truncate(self, fd: int, size: int) -> None:
        """Set the file's size in bytes."""
        ...

    def fstat(self, fd: int) -> FileInfo:
        """What an open file is."""
        ...

    def stat(self, path: str) -> FileInfo:
        """What is at a path, not following a symbolic link."""
        ...

    def names(self, path: str) -> list[Named]:
        """Plain files of a directory, in no order, by what the directory itself says."""
        ...

    def list(self, path: str) -> list[Listed]:
        """Entries of a directory, in no order; those that vanish meanwhile are left out."""
        ...

    def mkdir(self, path: str) -> None:
        """Make a directory (mode 0700) and its parents; leave one that exists.

        Raises OSError with EEXIST if something else is in its place.
        """
        ...

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Move a file to `target` in one step, in the place of a file that is there."""
        ...

    def link(self, source: str, target: str) -> None:
        """Give a file a second name, a hard link. Raises OSError with EEXIST if one has it."""
        ...

    def unlink(self, path: str) -> None:
        """Remove a file."""
        ...

    def utime(self, path: str, time_ns: int) -> None:
        """Set access and modification time, nanoseconds since the epoch."""
        ...

    def free_bytes(self, path: str) -> int:
        """Bytes that an unprivileged process may still allocate on the volume of `path`."""
        ...

    def try_lock(self, fd: int) -> bool:
        """Take the exclusive flock of an open file; False if another has it."""
        ...

    def try_lock_shared(self, fd: int) -> bool:
        """Take a shared flock of an open file; False if another has the exclusive one."""
        ...

    def unlock(self, fd: int) -> None:
        """Release the flock of an open file."""
        ...


class OsFileSystem:
    """The operating system's.

    root: a directory. From there on calls go from descriptor to descriptor, follow no symbolic
    link, and refuse with EACCES a directory that somebody else owns or may write: so no call ends
    up outside, whatever anybody puts inside. The way to the root itself is the caller's choice.
    Without a root, paths are taken as they are.
    """

    def __init__(self, root: str | None = None) -> None:
        self._root = root

    def open(self, path: str, flags: int) -> int:
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        fd = self._at(path, lambda at, name: os.open(name, flags, 0o600, dir_fd=at))
        if not S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EISDIR, "it is no plain file")
        return fd

    def close(self, fd: int) -> None:
        os.close(fd)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return os.pread(fd, length, offset)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def fstat(self, fd: int) -> FileInfo:
        return _info(os.fstat(fd))

    def stat(self, path: str) -> FileInfo:
        return self._at(
            path, lambda at, name: _info(os.stat(name, dir_fd=at, follow_symlinks=False))
        )

    def names(self, path: str) -> list[Named]:
        return self._scan(path, _names)

    def list(self, path: str) -> list[Listed]:
        return self._scan(path, _entries)

    def _scan(self, path: str, read: Callable[[str | int], T]) -> T:
        if self._root is None:
            return read(path)
        # A descriptor that only stands for a place cannot be read; "." beside it can.
        place = self._directory(path)
        try:
            fd = os.open(".", os.O_RDONLY | _DIRECTORY, dir_fd=place)
        finally:
            os.close(place)
        try:
            return read(fd)
        finally:
            os.close(fd)

    def mkdir(self, path: str) -> None:
        if self._root is None:
            os.makedirs(path, mode=0o700, exist_ok=True)
            return
        os.makedirs(self._root, mode=0o700, exist_ok=True)
        os.close(self._directory(path, make=True))

    def rmdir(self, path: str) -> None:
        self._at(path, lambda at, name: os.rmdir(name, dir_fd=at))

    def rename(self, source: str, target: str) -> None:
        def to_target(source_at: int | None, source_name: str) -> None:
            self._at(
                target,
                lambda at, name: os.rename(source_name, name, src_dir_fd=source_at, dst_dir_fd=at),
            )

        self._at(source, to_target)

    def link(self, source: str, target: str) -> None:
        def to_target(source_at: int | None, source_name: str) -> None:
            self._at(
                target,
                lambda at, name: os.link(
                    source_name,
                    name,
                    src_dir_fd=source_at,
                    dst_dir_fd=at,
                    follow_symlinks=False,
                ),
            )

        self._at(source, to_target)

    def unlink(self, path: str) -> None:
        self._at(path, lambda at, name: os.unlink(name, dir_fd=at))

    def utime(self, path: str, time_ns: int) -> None:
        times = (time_ns, time_ns)
        self._at(path, lambda at, name: os.utime(name, ns=times, dir_fd=at, follow_symlinks=False))

    def free_bytes(self, path: str) -> int:
        volume = os.statvfs(path)
        return volume.f_bavail * volume.f_frsize

    def try_lock(self, fd: int) -> bool:
        return _flock(fd, fcntl.LOCK_EX)

    def try_lock_shared(self, fd: int) -> bool:
        return _flock(fd, fcntl.LOCK_SH)

    def unlock(self, fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)

    def _at(self, path: str, call: Callable[[int | None, str], T]) -> T:
        """Call with the descriptor of the path's directory and the name in it."""
        directory, _, name = path.rpartition("/")
        if self._root is None:
            return call(None, path)
        at = self._directory(directory)
        try:
            return call(at, name)
        finally:
            os.close(at)

    def _directory(self, path: str, make: bool = False) -> int:
        """Descriptor that stands for a directory at or below the root. make: those missing."""
        assert self._root is not None
        at = os.open(self._root, os.O_PATH | _DIRECTORY)
        try:
            _check_private(at, self._root)
            for name in path[len(self._root) :].split("/"):
                if not name:
                    continue
                if make:
                    _make(name, at)
                inner = os.open(name, os.O_PATH | _DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                at, outer = inner, at
                os.close(outer)
                _check_private(at, path)
        except BaseException:
            os.close(at)
            raise
        return at


def _make(name: str, at: int) -> None:
    try:
        os.mkdir(name, 0o700, dir_fd=at)
    except FileExistsError:
        if not S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
            raise


def _check_private(at: int, path: str) -> None:
    """Raise PermissionError for a directory that others own or may write."""
    status = os.fstat(at)
    user = os.geteuid()
    if status.st_uid not in (user, 0):
        raise PermissionError(
            errno.EACCES,
            f"{path} belongs to uid {status.st_uid}, and this process runs as uid {user}; run it "
            "as the owner, or name another directory",
        )
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise PermissionError(
            errno.EACCES,
            f"{path} has mode {S_IMODE(status.st_mode):04o}, so others may write it; chmod go-w "
            "it, or name a new directory below it, which is then made for this user only",
        )


def _entries(directory: str | int) -> list[Listed]:
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                info = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            found.append((entry.name, info.st_mode, info.st_size, info.st_mtime_ns))
    return found


def _names(directory: str | int) -> list[Named]:
    with os.scandir(directory) as entries:
        return [
            (entry.name, entry.inode()) for entry in entries if entry.is_file(follow_symlinks=False)
        ]


def _flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _info(status: os.stat_result) -> FileInfo:
    return FileInfo(
        status.st_size, status.st_mtime_ns, status.st_ino, status.st_mode, status.st_nlink
    )
