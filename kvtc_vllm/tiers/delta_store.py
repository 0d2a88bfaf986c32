"""Keeps blobs as what they add to others of the same text, within one tenant."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kvtc_vllm.tiers.blob_store import Blob, MemoryStore, StoreError
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.sharded_dict import ShardedDict
from kvtc_vllm.tiers.token_windows import TokenWindows

logger = logging.getLogger("vllm.kvtc")

LARGEST_SHARE = 0.8
"""Of its blob that a difference may take; above it, decoding twice is not worth the bytes."""
LOST = "representative"
"""Reason why a record that is kept as a difference can't be read: what it differs from is gone, or
is not what it was."""


class Differences(Protocol):
    """Makes differences between blobs, and blobs of differences. Pure."""

    def encode(
        self,
        blob: Blob,
        sources: Sequence[Blob],
        runs: Sequence[tuple[int, int, int, int]],
        most: int,
    ) -> bytes | None:
        """At most `most` bytes from which and from the sources `decode` gives the very blob.

        None if there are none. runs: token, number of a source, token of it, how many are alike.
        """
        ...

    def decode(self, difference: Blob, sources: Sequence[Blob]) -> bytes:
        """The blob. Raises an exception for sources or bytes other than `encode` had."""
        ...


class Prepared(NamedTuple):
    """A blob that is ready to be written.

    tokens: ids of its tokens. difference: of at most `LARGEST_SHARE` of its bytes, if there is
    one. sources: names and blobs that it differs from.
    """

    blob: Blob
    tokens: bytes
    difference: bytes | None = None
    sources: tuple[tuple[RecordKey, Blob], ...] = ()


@dataclass
class _Source:
    """A blob that differences refer to. name: in the store below; another once it is removed."""

    name: RecordKey
    removed: bool = False
    users: dict[RecordKey, None] = field(default_factory=dict)


class DeltaStore:
    """A `MemoryStore` around another. Safe for the worker's step, encode and load threads.

    What is read is what was written, to the byte, or an error. Only whole blobs are referred to,
    never differences. One that is removed while differences refer to it stays, and the first of
    these is charged for it; when that one goes, the next is. So evicting it loses nothing else.
    """

    def __init__(self, inner: MemoryStore, differences: Differences) -> None:
        self._inner = inner
        self._differences = differences
        self._windows = TokenWindows()
        self._sources: ShardedDict[_Source] = ShardedDict()
        self._of: ShardedDict[tuple[_Source, ...]] = ShardedDict()
        self._resized: dict[RecordKey, int] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def prepare(self, key: RecordKey, blob: Blob, tenant: bytes, tokens: bytes) -> Prepared:
        """Look for what a blob can be a difference from, and make it. Takes as long as encoding.

        tenant: nobody's are alike to nothing. tokens: ids, `TOKEN_BYTES` each; none if unknown.
        """
        if not tokens or not tenant:
            return Prepared(blob, b"")
        with self._lock:
            found = self._windows.find(key, tenant, tokens)
            if found is None:
                return Prepared(blob, tokens)
            try:
                sources = tuple((name, self._inner.read(name)) for name in found.sources)
            except StoreError:
                return Prepared(blob, tokens)
        most = int(LARGEST_SHARE * len(blob))
        blobs = [source for _, source in sources]
        try:
            difference = self._differences.encode(blob, blobs, found.runs, most)
        except Exception as error:  # the blob itself is sound, and is kept
            logger.warning("kvtc: a chunk is kept whole, no difference can be made: %s", error)
            difference = None
        return Prepared(blob, tokens, difference, () if difference is None else sources)

    def write(self, key: RecordKey, blob: Blob | Prepared, tenant: bytes = b"") -> int:
        """Keep a blob; returns what it adds. Raises StoreError "full", and keeps nothing."""
        new = blob if isinstance(blob, Prepared) else Prepared(blob, b"")
        with self._lock:
            self._remove(key)
            if new.difference is not None and all(
                name != key and self._holds(name, source) for name, source in new.sources
            ):
                size = self._inner.write(key, new.difference)
                of = tuple(self._sources.setdefault(name, _Source(name)) for name, _ in new.sources)
                for source in of:
                    source.users[key] = None
                self._of[key] = of
                return size
            size = self._inner.write(key, new.blob)
            if new.tokens:
                self._windows.add(key, tenant, new.tokens)
            return size

    def read(self, key: RecordKey) -> Blob:
        """The blob. Raises StoreError "missing" or `LOST`."""
        with self._lock:
            kept = self._inner.read(key)
            of = self._of.get(key)
            if of is None:
                return kept
            try:
                sources = [self._inner.read(source.name) for source in of]
            except StoreError as error:
                raise StoreError(LOST, "what the record differs from is not in memory") from error
        try:
            return self._differences.decode(kept, sources)
        except Exception as error:  # whatever the bytes are, a load must only miss
            raise StoreError(LOST, f"the record can't be made whole: {error}") from error

    def remove(self, keys: Iterable[RecordKey]) -> int:
        """Forget blobs and return how many there were; unknown names are ignored."""
        with self._lock:
            return sum(self._remove(key) for key in list(keys))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._sources.clear()
            self._of.clear()
            self._resized.clear()
            self._windows.clear()
            self._inner.clear()

    def keys(self) -> list[RecordKey]:
        """Names of all blobs, oldest first."""
        with self._lock:
            stays = {source.name for of in self._of.values() for source in of if source.removed}
            kept = self._inner.keys()
        return [key for key in kept if key not in stays]

    def take_resized(self) -> list[tuple[RecordKey, int]]:
        """Blobs that are charged for a source now and were not, with all that they take."""
        with self._lock:
            resized, self._resized = self._resized, {}
        return list(resized.items())

    def _holds(self, name: RecordKey, blob: Blob) -> bool:
        """Whether this blob is kept under a name, and whole."""
        if name in self._of:
            return False
        try:
            return self._inner.read(name) is blob
        except StoreError:
            return False

    def _remove(self, key: RecordKey) -> bool:
        self._resized.pop(key, None)
        self._windows.remove(key)
        source = self._sources.pop(key, None)
        if source is not None:
            self._keep_for_users(source)
            return True
        removed = self._inner.remove([key]) > 0
        for source in self._of.pop(key, ()):
            charged = source.removed and next(iter(source.users)) == key
            del source.users[key]
            if not source.users:
                if source.removed:
                    self._inner.remove([source.name])
                else:
                    del self._sources[source.name]
            elif charged:
                self._charge(next(iter(source.users)))
        return removed

    def _keep_for_users(self, source: _Source) -> None:
        """Keep a blob that is removed as long as differences refer to it."""
        name, source.name = source.name, RecordKey(b"removed %d" % next(self._numbers))
        source.removed = True
        with contextlib.suppress(StoreError):  # lost: what refers to it can't be read any more
            blob = self._inner.read(name)
            self._inner.remove([name])
            self._inner.write(source.name, blob)
        self._charge(next(iter(source.users)))

    def _charge(self, key: RecordKey) -> None:
        """Note all that removing a difference would free."""
        size = self._size(key)
        for source in self._of[key]:
            if source.removed and next(iter(source.users)) == key:
                size += self._size(source.name)
        self._resized[key] = size

    def _size(self, name: RecordKey) -> int:
        """Bytes in the store below; 0 for what is lost."""
        try:
            return len(self._inner.read(name))
        except StoreError:
            return 0
