"""What to do with something that is where a file or directory of ours belongs."""

from __future__ import annotations

import logging
import os
from stat import S_ISDIR

from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError

logger = logging.getLogger("vllm.kvtc")

SET_ASIDE = "set-aside-"
"""Beginning of the names, in the root, under which it is kept and never looked at again."""


def clear_place(fs: CheckedFileSystem, root: str, path: str) -> None:
    """Move what is at `path` aside, within the root. Raises DiskError if that fails.

    The caller has just seen that it is not what belongs there.
    """
    aside = f"{root}/{SET_ASIDE}{os.urandom(8).hex()}"
    fs.rename(path, aside)
    logger.warning("kvtc: %s was in the way of the disk tier and is now %s", path, aside)


def make_directory(fs: CheckedFileSystem, root: str, path: str) -> None:
    """Make a directory whose parent is there; what else is in its place goes aside.

    Call under the root's lock: another process may just have made the directory, and that must
    not go aside.
    """
    try:
        fs.mkdir(path)
    except DiskError as error:
        if error.reason != "foreign":
            raise
        clear_place(fs, root, path)
        fs.mkdir(path)


def clear_directory(fs: CheckedFileSystem, root: str, path: str) -> None:
    """Move a directory aside that is where a file belongs. Raises DiskError."""
    there = fs.stat(path)
    if there is not None and S_ISDIR(there.mode):
        clear_place(fs, root, path)
