"""An arena that other processes of the machine read: one copy of what all of them have.

A file without a name holds pages of 4 KiB, and before them a table with the page that follows
each. A blob is a chain of pages, so that no room is lost between blobs of any size. One process
writes and frees; it tells where a chain begins, and how long it is, as one number, the *place*. The
others read by that. What they read may have been freed and written again meanwhile, so they copy it
out first, and whoever decodes it verifies the copy.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable, Iterator

from kvtc_vllm.tiers.blob_store import Blob, StoreError
from kvtc_vllm.tiers.keys import RecordKey

PAGE = 4096
"""Bytes."""
_ENTRY = 4
"""Bytes of the table per page."""
_LENGTH_BITS = 32
_MOST_PAGES = (1 << 31) - 1
"""So that a place is a positive number of 63 bits."""
_AT_ONCE = 1 << 20
"""Bytes."""
_END = 0
"""Follows the last page of a chain; pages are counted from 1."""


def page_bytes(size: int) -> int:
    """Bytes that a blob of `size` bytes takes, in whole pages."""
    return -(-size // PAGE) * PAGE


class _Pages:
    """The file as any process has it. fd: open; it is this object's own from now on."""

    def __init__(self, fd: int, count: int, protection: int) -> None:
        self.fd = fd
        self._count = count
        self._table_bytes = page_bytes(max(1, count) * _ENTRY)
        self._map = mmap.mmap(fd, self._table_bytes, prot=protection)
        self._next = memoryview(self._map).cast("I")

    def read_at(self, place: int) -> bytearray:
        """A copy of what lies there now. Raises StoreError "missing" for a place that can't be."""
        page, length = place >> _LENGTH_BITS, place & ((1 << _LENGTH_BITS) - 1)
        if not 0 < length <= self._count * PAGE:
            raise StoreError("missing", f"{place} is no place")
        blob = bytearray(length)
        view = memoryview(blob)
        done = 0
        for first, pages in self._runs(page, -(-length // PAGE)):
            size = min(pages * PAGE, length - done)
            if os.preadv(self.fd, [view[done : done + size]], self._offset(first)) != size:
                break
            done += size
        if done < length:
            raise StoreError("missing", f"nothing lies at {place} any more")
        return blob

    def close(self) -> None:
        """Let go of the file; the last process that does frees it."""
        self._next.release()
        self._map.close()
        os.close(self.fd)

    def _offset(self, page: int) -> int:
        return self._table_bytes + (page - 1) * PAGE

    def _runs(self, page: int, count: int) -> Iterator[tuple[int, int]]:
        """Neighbouring pages of a chain: the first one and how many; ends early where it breaks."""
        following, last = self._next, self._count
        while count and 0 < page <= last:
            first, after = page, following[page - 1]
            pages = 1
            while pages < count and after == page + 1 <= last:
                page, pages = after, pages + 1
                after = following[page - 1]
            yield first, pages
            count -= pages
            page = after


class SharedArena(_Pages):
    """A `MemoryStore`, the only writer of its file. Safe for many threads.

    capacity: bytes of pages; the table takes a thousandth more. The file takes memory as it is
    filled, and never gives it back. Raises OSError where the machine has no such files.
    """

    def __init__(self, capacity: int) -> None:
        count = min(capacity // PAGE, _MOST_PAGES)
        self.capacity = count * PAGE
        fd = os.memfd_create("kvtc-chunks")
        try:
            table = page_bytes(max(1, count) * _ENTRY)
            os.ftruncate(fd, table + self.capacity)
            # Written, so that memory which is not to be had is an error here, not a signal later.
            zeros = memoryview(bytes(min(table, _AT_ONCE)))
            for start in range(0, table, _AT_ONCE):
                _write(fd, zeros[: table - start], start)
            super().__init__(fd, count, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(fd)
            raise
        self._lock = threading.Lock()
        self._places: dict[RecordKey, int] = {}
        self._last: dict[RecordKey, int] = {}
        """Last page of each chain."""
        self._empty()

    def write(self, key: RecordKey, blob: Blob, tenant: bytes = b"") -> int:
        """Keep a blob; returns its bytes in whole pages. Raises StoreError "full"."""
        view = memoryview(blob).cast("B")
        needed = -(-len(view) // PAGE)
        with self._lock:
            before = self._places.get(key)
            own = 0 if before is None else _pages_of(before)
            if not 0 < needed <= self._count - self._used + own or len(view) >> _LENGTH_BITS:
                raise StoreError("full", f"{len(view)} bytes do not fit into {self.capacity}")
            if before is not None:
                self._free(key)
            first, self._last[key] = self._take(needed)
            self._places[key] = place = first << _LENGTH_BITS | len(view)
            try:
                self._fill(place, view)
            except OSError as error:  # the machine's memory, or what this process may have of it
                self._free(key)
                raise StoreError("full", str(error)) from error
        return needed * PAGE

    def places(self, keys: Iterable[RecordKey]) -> list[tuple[RecordKey, int]]:
        """Where blobs lie, for `read_at` in any process; those that are there."""
        with self._lock:
            return [(key, self._places[key]) for key in keys if key in self._places]

    def read(self, key: RecordKey) -> bytearray:
        """A copy of the blob. Raises StoreError "missing"."""
        with self._lock:
            place = self._places.get(key)
            if place is None:
                raise StoreError("missing", "the record is not in memory")
            return self.read_at(place)

    def remove(self, keys: Iterable[RecordKey]) -> int:
        """Forget blobs and return how many there were; unknown names are ignored."""
        removed = 0
        with self._lock:
            for key in keys:
                if key in self._places:
                    self._free(key)
                    removed += 1
        return removed

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._places.clear()
            self._last.clear()
            self._empty()

    @property
    def used(self) -> int:
        """Bytes held, in whole pages."""
        with self._lock:
            return self._used * PAGE

    def __len__(self) -> int:
        with self._lock:
            return len(self._places)

    def keys(self) -> list[RecordKey]:
        """Snapshot of the keys, oldest first."""
        with self._lock:
            return list(self._places)

    def take_resized(self) -> list[tuple[RecordKey, int]]:
        """None: no two blobs share a page."""
        return []

    # Called under the lock.

    def _empty(self) -> None:
        self._used = 0
        self._spare = _END
        """First page of a chain of pages that were freed."""
        self._fresh = 1
        """From here on no page was ever used."""

    def _take(self, count: int) -> tuple[int, int]:
        """A chain of `count` pages, of which there are as many: the first and the last one."""
        following = self._next
        first = last = _END
        for _ in range(count):
            if self._spare != _END:
                page, self._spare = self._spare, following[self._spare - 1]
            else:
                page, self._fresh = self._fresh, self._fresh + 1
            if last == _END:
                first = page
            else:
                following[last - 1] = page
            last = page
        following[last - 1] = _END
        self._used += count
        return first, last

    def _free(self, key: RecordKey) -> None:
        """Forget a blob, and put its chain before the spare pages."""
        place = self._places.pop(key)
        self._next[self._last.pop(key) - 1] = self._spare
        self._spare = place >> _LENGTH_BITS
        self._used -= _pages_of(place)

    def _fill(self, place: int, view: memoryview) -> None:
        done = 0
        for first, pages in self._runs(place >> _LENGTH_BITS, _pages_of(place)):
            part = view[done : done + pages * PAGE]
            _write(self.fd, part, self._offset(first))
            done += len(part)


class SharedView(_Pages):
    """Another process' `SharedArena`, to read from. Safe for many threads.

    fd: the arena's file, this object's own from now on; capacity: the arena's.
    """

    def __init__(self, fd: int, capacity: int) -> None:
        super().__init__(fd, capacity // PAGE, mmap.PROT_READ)


def _pages_of(place: int) -> int:
    return -(-(place & ((1 << _LENGTH_BITS) - 1)) // PAGE)


def _write(fd: int, data: memoryview, offset: int) -> None:
    """All of it. Not through a map: where there is no memory a write fails, and a map kills."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
