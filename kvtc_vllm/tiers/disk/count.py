"""Going through all chunks of a namespace: in steps, between which others have the lock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from kvtc_vllm.tiers.disk import reference, scan
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem
from kvtc_vllm.tiers.disk.layout import FAN_OUTS, disk_bytes, fan_out_path
from kvtc_vllm.tiers.disk.ledger import LONGEST_PAUSE_SECONDS, Account, LedgerState
from kvtc_vllm.tiers.disk.scan import ChunkFile, KnownFile
from kvtc_vllm.tiers.keys import RecordKey

FILES_AT_ONCE = 4096
"""Looked at under one hold of the root's lock: some hundredths of a second."""

Known = Callable[[int], Mapping[RecordKey, KnownFile]]
"""What is known of the files in a fan-out directory."""


def let_others() -> None:
    """Wait so long that somebody else who waits for the root's lock gets it."""
    time.sleep(LONGEST_PAUSE_SECONDS)


class NamespaceCount:
    """Counts namespaces of `root` and lists their chunks.

    locked: the root's lock. refuse: called under it for each file that is larger than a chunk.
    most_bytes: of a chunk, by the namespace's directory name.
    """

    def __init__(
        self,
        fs: CheckedFileSystem,
        root: str,
        locked: Callable[[], AbstractContextManager[LedgerState]],
        refuse: Callable[[ChunkFile], object],
        most_bytes: Callable[[str], int],
    ) -> None:
        self._fs = fs
        self._root = root
        self._locked = locked
        self._refuse = refuse
        self._most_bytes = most_bytes

    def run(self, namespace: str, found: list[ChunkFile], known: Known | None = None) -> None:
        """Count from the start: removes temporaries of dead writers, corrects the account.

        known: of a fan-out directory's files, what need not be asked for.

        Appends the chunks to `found`, in no order. The result is exact even if others change the
        namespace meanwhile, see `Account`; if another process counts too, the one that began last
        decides. Raises DiskError.
        """
        place = 0
        with self._locked() as ledger:
            ledger.account(namespace).begin_count()
            place = self._go_on(ledger.account(namespace), namespace, place, found, known)
        while place < FAN_OUTS:
            let_others()
            with self._locked() as ledger:
                place = self._go_on(ledger.account(namespace), namespace, place, found, known)

    def finish(self, namespace: str) -> None:
        """Go on with a count that anybody has begun, until the account is known."""
        while True:
            with self._locked() as ledger:
                account = ledger.account(namespace)
                if account.known:
                    return
                self._go_on(account, namespace, max(0, account.next), [])
            let_others()

    def _go_on(
        self,
        account: Account,
        namespace: str,
        place: int,
        found: list[ChunkFile],
        known: Known | None = None,
    ) -> int:
        """One step from fan-out directory `place` on; returns where the next begins."""
        directory = f"{self._root}/{namespace}"
        there = scan.fan_outs(self._fs, directory)
        most = self._most_bytes(namespace)
        looked_at = 0
        while place < FAN_OUTS and looked_at < FILES_AT_ONCE:
            chunks: list[ChunkFile] = []
            links: list[str] = []
            if place in there:
                files = known(place) if known is not None else None
                chunks += scan.chunks_in(self._fs, directory, place, files, links)
            looked_at += len(chunks) + len(links)
            for chunk in chunks:
                if chunk.length > most:
                    self._refuse(chunk)
            chunks = [chunk for chunk in chunks if chunk.length <= most]
            found += chunks
            kept = self._kept(namespace, directory, place) if links else 0
            counts = account.next == place
            place += 1
            if counts:
                account.counted += kept + sum(disk_bytes(chunk.length) for chunk in chunks)
                if place < FAN_OUTS:
                    account.next = place
                else:
                    account.end_count(scan.remove_orphans(self._fs, directory))
        return place

    def _kept(self, namespace: str, directory: str, place: int) -> int:
        """Bytes of representatives that have only links left; links of nobody go."""
        most = self._most_bytes(namespace)
        names = self._fs.names(fan_out_path(directory, place))
        return reference.kept_bytes(self._fs, directory, place, names, most, self._fs.unlink)
