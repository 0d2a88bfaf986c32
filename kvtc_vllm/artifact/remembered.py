"""Fingerprints of weight files, remembered in the process and in a cache on disk.

A fingerprint belongs to the files' device, inode, size, modification and change time. Archives,
`rsync -a` and `cp -p` keep size and modification time, but cannot set the change time. Files
changed in the last two seconds are not remembered: a later write within the same tick of
the file system's clock would show in none of these.

The cache is `fingerprints.json` in $KVTC_CACHE_DIR, else `$XDG_CACHE_HOME/kvtc`, else
`~/.cache/kvtc`. Whatever is wrong with it only costs reading the weights again. A lock beside
it lets the ranks of a model that start together read its weights once.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

CACHE_VARIABLE = "KVTC_CACHE_DIR"
CACHE_FILE = "fingerprints.json"
LOCK_FILE = "fingerprints.lock"
MAX_ENTRIES = 256
MAX_CACHE_BYTES = 2**20
WAIT_SECONDS = 120.0
"""For another process that may be reading the same weights."""
FRESH_NS = 2 * 10**9

_PAUSE_SECONDS = 0.05
_USED_AGAIN_SECONDS = 86400
"""Uses closer together than this are one: not every start writes the cache."""
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")

_known: dict[str, str] = {}


class FileState(NamedTuple):
    """A file as it is now. Other content in one of these states goes unnoticed."""

    name: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class _Entry(msgspec.Struct):
    """fingerprint: 32 hex digits. used: seconds since the epoch."""

    fingerprint: str
    used: int


def file_state(path: Path) -> FileState:
    """The state of the file that `path` leads to. Raises OSError."""
    found = path.stat()
    return FileState(
        path.name,
        found.st_dev,
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )


def remember(states: Sequence[FileState], mode: str, compute: Callable[[], str]) -> str:
    """The fingerprint of files in these states, computed if it is not remembered.

    mode: how it is computed. Raises what `compute` raises and nothing else.
    """
    key = xxhash.xxh3_128_hexdigest(json.dumps([mode, *states]).encode())
    if key not in _known:
        if _are_fresh(states):
            return compute()
        directory = cache_directory()
        _known[key] = compute() if directory is None else _look_up(directory, key, compute)
    return _known[key]


def _are_fresh(states: Sequence[FileState]) -> bool:
    """True also for times in the future, which tell nothing."""
    newest = max(max(state.mtime_ns, state.ctime_ns) for state in states)
    return time.time_ns() - newest < FRESH_NS


def _look_up(directory: Path, key: str, compute: Callable[[], str]) -> str:
    found = (_load(directory) or {}).get(key)
    if found is not None and time.time() - found.used < _USED_AGAIN_SECONDS:
        return found.fingerprint
    with _locked(directory):
        entries = _load(directory)
        found = (entries or {}).get(key)  # somebody else may just have computed it
        fingerprint = compute() if found is None else found.fingerprint
        entries = _load(directory)
        if entries is not None:
            entries[key] = _Entry(fingerprint, int(time.time()))
            _save(directory, entries)
    return fingerprint


def cache_directory() -> Path | None:
    """The user's cache directory of this project, made if need be; None if it can be nowhere."""
    chosen, base = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification has relative paths ignored.
        home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
        directory = Path(chosen) if chosen else home / "kvtc"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError):
        return None
    return directory


def _load(directory: Path) -> dict[str, _Entry] | None:
    """What is remembered; None if the file is not a plain one of our own, to be left alone."""
    try:
        # Opening a pipe would wait for somebody to write to it.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(directory / CACHE_FILE, flags)
    except FileNotFoundError:
        return {}
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return None
        if found.st_size > MAX_CACHE_BYTES:
            return {}
        with open(fd, "rb", closefd=False) as file:
            content = file.read(MAX_CACHE_BYTES)
        entries = msgspec.json.decode(content, type=dict[str, _Entry])
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError):
        return {}
    finally:
        os.close(fd)
    return {k: e for k, e in entries.items() if _FINGERPRINT.fullmatch(e.fingerprint)}


def _save(directory: Path, entries: dict[str, _Entry]) -> None:
    """Replace the cache by the entries used last, if that is possible."""
    latest = sorted(entries.items(), key=lambda item: item[1].used)[-MAX_ENTRIES:]
    with suppress(OSError):
        fd, temporary = tempfile.mkstemp(".tmp", "fingerprints-", directory)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.encode(dict(latest)))
            os.replace(temporary, directory / CACHE_FILE)
        except OSError:
            os.unlink(temporary)
            raise


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Alone if that can be had in time, else all the same."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(directory / LOCK_FILE, flags, 0o600)
    except OSError:
        yield
        return
    try:
        _wait_for(fd)
        yield
    finally:
        os.close(fd)


def _wait_for(fd: int) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE_SECONDS)
        except OSError:
            return
        else:
            return
