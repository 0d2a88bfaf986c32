"""Removal of a whole namespace, by its own store or by an operator."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice

from kvtc_vllm.tiers.disk import scan
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem, DiskError
from kvtc_vllm.tiers.disk.layout import (
    IN_USE_FILE,
    LIST_FILE,
    NEW_LIST_FILE,
    OLD_REMOVALS_FILE,
    RECORD_FILE,
    REMOVALS_FILE,
    TEMPORARY_DIRECTORY,
    is_fan_out,
)
from kvtc_vllm.tiers.disk.space import Space

LISTED_AT_ONCE = 4096
"""Keys in memory."""


def drop_namespace(fs: CheckedFileSystem, space: Space, root: str, namespace: str) -> int:
    """Remove a namespace; returns how many chunks it had.

    Its directories go too, unless a living writer or a file that is not ours is in them.
    Raises DiskError if a chunk cannot be removed or the lock cannot be had; what is left
    then may be dropped again.
    """
    directory = f"{root}/{namespace}"
    chunks = scan.chunks(fs, directory)
    removed = 0
    while keys := [chunk.key for chunk in islice(chunks, LISTED_AT_ONCE)]:
        removed += space.remove(namespace, keys)
    space.count(namespace)  # for its effect: it removes the temporaries of dead writers
    with space.locked() as ledger:
        for name, *_ in fs.list(directory):
            if is_fan_out(name) or name == TEMPORARY_DIRECTORY:
                with suppress(DiskError):  # something is in it
                    fs.rmdir(f"{directory}/{name}")
        # The record last: while it is there, `kvtc gc` finds what a killed process left.
        for name in (
            LIST_FILE,
            NEW_LIST_FILE,
            REMOVALS_FILE,
            OLD_REMOVALS_FILE,
            IN_USE_FILE,
            RECORD_FILE,
        ):
            with suppress(DiskError):
                fs.unlink(f"{directory}/{name}")
        with suppress(DiskError):
            fs.rmdir(directory)
        if fs.stat(directory) is None:
            ledger.accounts.pop(namespace, None)
    return removed
