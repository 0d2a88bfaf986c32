"""Room under the cap: which chunks go, and in steps between which others have the lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from kvtc_vllm.tiers.disk import scan
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem
from kvtc_vllm.tiers.disk.count import Known, NamespaceCount, let_others
from kvtc_vllm.tiers.disk.filesystem import FileInfo
from kvtc_vllm.tiers.disk.layout import chunk_path, disk_bytes
from kvtc_vllm.tiers.disk.ledger import LedgerState
from kvtc_vllm.tiers.disk.recency import Recency
from kvtc_vllm.tiers.disk.scan import ChunkFile, last_use, without_collector
from kvtc_vllm.tiers.disk.sorting import Queue, in_order
from kvtc_vllm.tiers.disk.turns import short_turns
from kvtc_vllm.tiers.keys import RecordKey

MIN_CANDIDATES = 1024
CANDIDATE_SHARE = 8
"""A survey keeps at least the oldest eighth: it then costs the scan of about eight files an
eviction."""
REMOVED_AT_ONCE = 256
"""Chunks removed under one hold of the root's lock, for which others wait."""
VAIN_SURVEYS = 3
"""Surveys whose candidates all turn out to be in use, until there counts as nothing to evict."""


class TakeAway(Protocol):
    """Removes what is in a chunk's place, under the lock.

    Returns the bytes freed, none where others refer to it; None if it is gone already.
    """

    def __call__(
        self, ledger: LedgerState, namespace: str, key: RecordKey, there: FileInfo
    ) -> int | None: ...


class Evictor:
    """Evicts the least recently used chunks of a root. Thread-safe.

    capacity, min_free: bytes. count, locked, take_away: of the `Space` that it works for. evicted:
    called under the lock for each chunk, with the bytes freed.
    """

    def __init__(
        self,
        fs: CheckedFileSystem,
        root: str,
        capacity: int,
        min_free: int,
        recency: Recency,
        count: NamespaceCount,
        locked: Callable[[], AbstractContextManager[LedgerState]],
        take_away: TakeAway,
        evicted: Callable[[ChunkFile, int], None],
    ) -> None:
        self._fs = fs
        self._root = root
        self.capacity = capacity
        self._min_free = min_free
        self._recency = recency
        self._count = count
        self._locked = locked
        self._take_away = take_away
        self._evicted = evicted
        self._surveying = threading.Lock()
        self.candidates: Queue[ChunkFile] = Queue()
        """The next to go, least recently used first."""

    def room(self, size: int) -> Room:
        """An attempt to make room for `size` bytes. Raises DiskError."""
        # What is freed counts from here on: file systems may take a while to show it.
        return Room(self, size, self._fs.free_bytes(self._root) - self._min_free)

    def evict(self, ledger: LedgerState, missing: int) -> int:
        """Evict under the lock until `missing` bytes are freed, or enough for one hold of it.

        Returns the bytes freed; 0 once there are no candidates.
        """
        freed = 0
        for _ in range(REMOVED_AT_ONCE):
            if freed >= missing or not self.candidates:
                break
            freed += self._evict_one(ledger, self.candidates.popleft())
        return freed

    def give_way(self, size: int) -> bool:
        """Evict `size` bytes whatever the cap is. False if there was nothing to evict."""
        freed = 0
        for _ in range(VAIN_SURVEYS):
            with self._locked() as ledger:
                freed += self.evict(ledger, size - freed)
            if freed >= size or (not self.candidates and not self.survey(size - freed)):
                break
        return freed > 0

    def survey(self, missing: int) -> bool:
        """Count every namespace and choose the next candidates; False if there are none.

        At least those whose removal frees `missing` bytes.
        """
        with self._surveying:
            if self.candidates:
                return True  # another thread was faster
            with without_collector(), short_turns():
                found = self.look_through()
                self.candidates = Queue(_oldest(found, missing))
            return bool(self.candidates)

    def count(self, namespace: str, known: Known | None = None) -> list[ChunkFile]:
        """Count one namespace; returns its chunks, in no order. known: see `NamespaceCount`."""
        found: list[ChunkFile] = []
        self._count.run(namespace, found, known)
        self._saw(found)
        return found

    def look_through(self) -> list[ChunkFile]:
        """Count all; returns every chunk, in no order."""
        found: list[ChunkFile] = []
        for name in scan.namespaces(self._fs, self._root):
            self._count.run(name, found)
        self.count_unknown()
        self._saw(found)
        return found

    def _saw(self, found: list[ChunkFile]) -> None:
        self._recency.seen(max((chunk.mtime_ns for chunk in found), default=0))

    def count_unknown(self) -> None:
        """Count what is not known, and drop accounts of namespaces that are gone."""
        with self._locked() as ledger:
            there = set(scan.namespaces(self._fs, self._root))
            for name in [name for name in ledger.accounts if name not in there]:
                del ledger.accounts[name]
            unknown = [name for name, account in ledger.accounts.items() if not account.known]
        for name in unknown:
            self._count.finish(name)

    def _evict_one(self, ledger: LedgerState, chunk: ChunkFile) -> int:
        """Bytes freed: 0 if the chunk is gone or was used since the survey, or is referred to."""
        there = self._fs.stat(chunk_path(f"{self._root}/{chunk.namespace}", chunk.key))
        if there is None or there.mtime_ns != chunk.mtime_ns or not there.is_regular:
            return 0
        freed = self._take_away(ledger, chunk.namespace, chunk.key, there)
        if freed is None:
            return 0
        self._evicted(chunk, freed)
        return freed


def _oldest(found: list[ChunkFile], missing: int) -> Iterator[ChunkFile]:
    """A share of the chunks, and more if these are less than `missing` bytes. Empties the list."""
    share = max(MIN_CANDIDATES, len(found) // CANDIDATE_SHARE)
    for number, chunk in enumerate(in_order(found, last_use)):
        if number >= share and missing <= 0:
            return
        missing -= disk_bytes(chunk.length)
        yield chunk


class Room:
    """Room for `size` bytes, made in holds of the lock with pauses between them.

    free: bytes on the volume beyond the minimum. missing: bytes still to be freed.
    """

    def __init__(self, evictor: Evictor, size: int, free: int) -> None:
        self._evictor = evictor
        self._size = size
        self._free = free
        self._freed = self._freed_before = 0
        self._vain = 0
        self._exhausted = False
        self.missing = 0

    def make(self, ledger: LedgerState) -> bool:
        """Evict under the lock. True if there is room now."""
        if not self._is_there(ledger):
            self._freed += self._evictor.evict(ledger, self.missing)
        return self._is_there(ledger)

    def _is_there(self, ledger: LedgerState) -> bool:
        over_cap = ledger.used + self._size - self._evictor.capacity
        self.missing = max(over_cap, self._size - self._free - self._freed)
        return self.missing <= 0

    def find(self) -> bool:
        """Without the lock: look for what can be evicted. False if the last look was in vain."""
        if self._evictor.candidates:
            let_others()
            return True
        self._vain = self._vain + 1 if self._freed == self._freed_before else 0
        self._freed_before = self._freed
        if self._exhausted or self._vain > VAIN_SURVEYS:
            return False
        # Even if it finds nothing, it has corrected the ledger: there may be room all the same.
        self._exhausted = not self._evictor.survey(self.missing)
        return True
