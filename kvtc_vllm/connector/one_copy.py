"""One copy of latents for all tensor-parallel ranks: whether it can be, and the memory for it.

Every rank of a model with multi-head latent attention holds the same cache. Its first rank keeps
it for all, in memory that the others read. They get the file of that memory over a socket in a
directory of their user's own, which works without /proc and whatever the size of /dev/shm.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kvtc_vllm.config import ConfigError, KVTCConfig
from kvtc_vllm.offload.geometry import CacheGeometry
from kvtc_vllm.offload.names import Gather
from kvtc_vllm.tiers.shared_arena import SharedArena, SharedView

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("vllm.kvtc")

SECONDS = 30.0
"""For a rank to get the file."""
_PATH_BYTES = 100
"""Of a socket's path, which the system limits."""


def wants_one_copy(
    config: KVTCConfig, geometry: CacheGeometry, foreign: bool = False, *, says: bool = False
) -> bool:
    """Whether ranks are to share one copy, by the configuration; the same on both sides.

    foreign: chunks are coded by something else than the configured codec. says: log why not, where
    there is something to share. Raises ConfigError if the user insists on what can't be.
    """
    if config.latent_copies == "each" or geometry.tp_size == 1:
        return False
    same = any(group.latent for group in geometry.groups)
    why = _why_not(config, geometry, foreign) if same else "ranks have alike latents only (MLA)"
    if why is not None and config.latent_copies == "one":
        raise ConfigError(f"latent_copies='one' can't be: {why}; set 'auto' or 'each'")
    if why is not None and same and says:
        logger.info("kvtc: every rank keeps a copy of its own of all latents: %s", why)
    return why is None


def _why_not(config: KVTCConfig, geometry: CacheGeometry, foreign: bool) -> str | None:
    if foreign:
        return "a codec of measurements codes them"
    if len(geometry.groups) > 1:
        return f"one copy is for one cache group, the model has {len(geometry.groups)}"
    if geometry.pp_size > 1:
        return f"one copy is for one pipeline stage, there are {geometry.pp_size}"
    if config.joint not in ("auto", "off"):
        return f"joint is {config.joint}"
    if config.degrade != "off":
        return f"degrade is {config.degrade}"
    if config.disk_path is not None and config.disk_write == "behind":
        return "disk_write is behind"
    return None


def share_memory(config: KVTCConfig, rank: int, gather: Gather) -> SharedArena | SharedView | None:
    """The common memory: the first rank's to write, the others' to read; None if it can't be.

    All ranks call it together, and all get it or none does. Raises ConfigError instead of None if
    the user insists.
    """
    shared, why = _try(config.memory_capacity, rank, gather)
    if shared is not None and rank == 0:
        logger.info("kvtc: latents are kept once for all ranks, by the first one")
    if shared is None and config.latent_copies == "one":
        raise ConfigError(f"latent_copies='one' can't be: {why}; set 'auto' or 'each'")
    if shared is None and rank == 0:
        logger.warning("kvtc: every rank keeps a copy of its own of all latents: %s", why)
    return shared


def _try(
    capacity: int, rank: int, gather: Gather
) -> tuple[SharedArena | SharedView | None, str | None]:
    shared: SharedArena | SharedView | None = None
    door, why = None, None
    if rank == 0:
        try:
            shared = arena = SharedArena(capacity)
            capacity = arena.capacity  # where its pages begin depends on it
            door = _Door(arena.fd)
        except Exception as error:  # the others wait to be told
            why = f"the first rank can't make memory that others read: {error}"
    host = socket.gethostname()
    told = gather((host, None if door is None else door.path, capacity))
    first_host, path, capacity = told[0]
    try:
        if rank and path is not None:
            try:
                shared = SharedView(_receive(path), capacity)
            except Exception as error:
                where = "" if host == first_host else f" of host {first_host} on host {host}"
                why = f"rank {rank} can't have the first rank's memory{where}: {error}"
        reasons = [reason for reason in gather(why) if reason is not None]
    finally:
        if door is not None:
            door.close()
    if reasons:
        if shared is not None:
            shared.close()
        return None, reasons[0]
    return shared, None


class _Door:
    """A socket at which processes of this user get an open file. fd: stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._directory = next(_directories())
        self.path = os.path.join(self._directory, "kvtc")
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(self.path)
            self._socket.listen(64)
        except OSError:
            self._leave()
            raise
        self._closed = False
        self._thread = threading.Thread(target=self._serve, args=(fd,), name="kvtc-door")
        self._thread.start()

    def _serve(self, fd: int) -> None:
        while not self._closed:
            with suppress(OSError):  # who failed to get it will tell
                other, _ = self._socket.accept()
                with other:
                    other.settimeout(SECONDS)
                    socket.send_fds(other, [b"f"], [fd])

    def close(self) -> None:
        self._closed = True
        with suppress(OSError), _connected(self.path):
            pass  # wakes the thread
        self._thread.join(SECONDS)
        self._leave()

    def _leave(self) -> None:
        self._socket.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _directories() -> Iterator[str]:
    """A new directory, mode 700, in which a socket's path is not too long. Raises OSError."""
    for parent in (None, "/tmp"):
        made = tempfile.mkdtemp(prefix="kvtc-", dir=parent)
        if len(os.fsencode(made)) < _PATH_BYTES:
            yield made
        Path(made).rmdir()
    raise OSError("no directory has a path short enough for a socket")


def _connected(path: str) -> socket.socket:
    """Raises OSError."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(SECONDS)
    try:
        client.connect(path)
    except OSError:
        client.close()
        raise
    return client


def _receive(path: str) -> int:
    """The file that is given out at a socket. Raises OSError."""
    with _connected(path) as client:
        _, fds, _, _ = socket.recv_fds(client, 1, 1)
    if not fds:
        raise OSError("it was not handed over")
    os.set_inheritable(fds[0], False)
    return fds[0]
