"""What is really on disk, measured without the package's own code."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG

BLOCK = 4096


def chunk_files(root: Path) -> list[Path]:
    return sorted(root.glob("*/??/*.kvtc"))


def temporaries(root: Path) -> list[Path]:
    return sorted(root.rglob("*.tmp"))


def links(root: Path) -> list[Path]:
    """To representatives, by which references to them are read."""
    return sorted(root.glob("*/??/*.body"))


def bytes_on_disk(root: Path) -> int:
    """Whole blocks of all chunks and temporaries that exist at one moment or another.

    And of files that have only links left, once each.
    """
    total = 0
    chunks: set[int] = set()
    linked: dict[int, int] = {}
    for directory, _, names in os.walk(root):
        for name in names:
            if name.endswith((".kvtc", ".tmp", ".body")):
                try:
                    status = os.lstat(os.path.join(directory, name))
                except FileNotFoundError:
                    continue
                if not S_ISREG(status.st_mode):
                    continue
                size = -(-status.st_size // BLOCK) * BLOCK
                if name.endswith(".body"):
                    linked[status.st_ino] = size
                else:
                    total += size
                    chunks.add(status.st_ino)
    return total + sum(size for inode, size in linked.items() if inode not in chunks)


def kept_bytes(root: Path) -> int:
    """Of `bytes_on_disk`, what has no other name than those of links."""
    chunks = {path.stat().st_ino for path in chunk_files(root)}
    files = {path.stat().st_ino: path.stat().st_size for path in links(root)}
    return sum(-(-size // BLOCK) * BLOCK for inode, size in files.items() if inode not in chunks)


def ledger_bytes(root: Path) -> int:
    return sum(account.get("used", 0) for account in ledger_accounts(root).values())


def ledger_accounts(root: Path) -> dict[str, dict[str, int]]:
    return json.loads((root / "ledger.json").read_text())["accounts"]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def standing_still(root: Path) -> Iterator[None]:
    """Hold the root's lock, so that no chunk or temporary comes or goes meanwhile."""
    with open(root / "ledger.json") as ledger:
        fcntl.flock(ledger, fcntl.LOCK_EX)
        yield
