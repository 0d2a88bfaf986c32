"""Files that are expected to be plain ones of a certain size, and may be anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

from kvtc_vllm.codec.errors import ArtifactError


@contextmanager
def open_regular(path: Path, most_bytes: int) -> Iterator[tuple[BinaryIO, int]]:
    """Open a plain file, or a link to one, to read; yields it and its size in bytes.

    Raises ArtifactError that names the path for a missing or unreadable file, a directory, pipe,
    socket or device, and one of more than `most_bytes`. Never waits for the other end of a pipe.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise ArtifactError(f"{path}: {problem}") from error
    status = os.fstat(fd)
    if not S_ISREG(status.st_mode):
        os.close(fd)
        raise ArtifactError(f"{path}: not a plain file")
    with open(fd, "rb") as file:
        if status.st_size > most_bytes:
            raise ArtifactError(
                f"{path}: {status.st_size} bytes are too many, at most {most_bytes} are right"
            )
        yield file, status.st_size


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The content of a plain file. Raises ArtifactError as `open_regular` does."""
    with open_regular(path, most_bytes) as (file, size):
        try:
            return file.read(size)
        except OSError as error:
            raise ArtifactError(f"{path}: {error.strerror}") from error
