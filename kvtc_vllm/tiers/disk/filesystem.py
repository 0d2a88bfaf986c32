"""Every call that the disk tier makes to the operating system, and nothing else.

Fault injection and hung disks are made by wrapping exactly this.
"""

from __future__ import annotations

import fcntl
import os
from typing import NamedTuple, Protocol

Listed = tuple[str, int, int, int]
"""One entry of a directory: name, mode (with the file's type), size in bytes, modification time
in nanoseconds since the epoch. A plain tuple, because there are hundreds of thousands."""


class FileInfo(NamedTuple):
    """One file. size: bytes. mtime_ns: last modification, nanoseconds since the epoch."""

    size: int
    mtime_ns: int
    inode: int


class FileSystem(Protocol):
    """POSIX calls by path or descriptor. All may raise OSError; called from any thread."""

    def open(self, path: str, flags: int) -> int:
        """Descriptor, close-on-exec, not following a symbolic link; new files get mode 0600."""
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
        """Size, modification time and inode of an open file."""
        ...

    def stat(self, path: str) -> FileInfo:
        """The same of the file at a path, not following a symbolic link."""
        ...

    def list(self, path: str) -> list[Listed]:
        """Entries of a directory, in no order; those that vanish meanwhile are left out."""
        ...

    def mkdir(self, path: str) -> None:
        """Make a directory (mode 0700) and its parents; leave one that exists."""
        ...

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Move a file to `target` in one step, in the place of a file that is there."""
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
    """The operating system's. Stateless."""

    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

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
        return _info(os.lstat(path))

    def list(self, path: str) -> list[Listed]:
        found = []
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    info = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                found.append((entry.name, info.st_mode, info.st_size, info.st_mtime_ns))
        return found

    def mkdir(self, path: str) -> None:
        os.makedirs(path, mode=0o700, exist_ok=True)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def utime(self, path: str, time_ns: int) -> None:
        os.utime(path, ns=(time_ns, time_ns), follow_symlinks=False)

    def free_bytes(self, path: str) -> int:
        volume = os.statvfs(path)
        return volume.f_bavail * volume.f_frsize

    def try_lock(self, fd: int) -> bool:
        return _flock(fd, fcntl.LOCK_EX)

    def try_lock_shared(self, fd: int) -> bool:
        return _flock(fd, fcntl.LOCK_SH)

    def unlock(self, fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _info(status: os.stat_result) -> FileInfo:
    return FileInfo(status.st_size, status.st_mtime_ns, status.st_ino)
