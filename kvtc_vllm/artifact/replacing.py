"""Files that are read whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path`, to be written in the block; it takes the place of `path` at its end.

    If the block raises it is removed, and what was at `path` stays. For one writer of a path at a
    time. Raises OSError.
    """
    unfinished = path.with_name(f"{path.name}.writing")
    try:
        yield unfinished
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    unfinished.replace(path)
