"""A dictionary of millions of keys, no operation of which takes long.

A dictionary that is full moves all of its entries to a larger one, and one that is cleared frees
all of them, in one go: with five million keys that is 0.2 s, during which Python's lock is held and
a step of the scheduler waits. Here the keys are spread over many small dictionaries, which grow one
by one, and what is cleared goes bit by bit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, MutableMapping
from typing import Any, TypeVar

V = TypeVar("V")

SHARDS = 256
"""By the first byte or the last bits of the key. With five million keys each has 20,000, and grows
in a millisecond."""
FREED_AT_ONCE = 256
"""Entries: some hundredths of a millisecond."""
PAUSE_SECONDS = 0.0005
"""Between two of these, so that freeing takes a few per cent of a core and no lock for long."""

_lock = threading.Lock()
_waiting: list[dict[Any, Any]] = []
_thread: threading.Thread | None = None


class ShardedDict(MutableMapping[bytes, V]):
    """A dictionary whose keys are hashes: bytes, at least one of them.

    No containers among the values, or Python's cycle collector visits them. Not thread-safe.
    Iterates in no order. Where a look-up must not cost a call, use `shards[key[0]]`.
    """

    def __init__(self) -> None:
        self.shards: list[dict[bytes, V]] = [{} for _ in range(SHARDS)]

    def __getitem__(self, key: bytes) -> V:
        return self.shards[key[0]][key]

    def __setitem__(self, key: bytes, value: V) -> None:
        self.shards[key[0]][key] = value

    def __delitem__(self, key: bytes) -> None:
        del self.shards[key[0]][key]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and key in self.shards[key[0]]

    def __iter__(self) -> Iterator[bytes]:
        for shard in self.shards:
            yield from shard

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def get(self, key: bytes, default: Any = None) -> Any:
        """As of a dictionary."""
        return self.shards[key[0]].get(key, default)

    def pop(self, key: bytes, *default: Any) -> Any:
        """As of a dictionary."""
        return self.shards[key[0]].pop(key, *default)

    def take_all(self) -> list[dict[bytes, V]]:
        """Empties it; returns what it held."""
        shards, self.shards = self.shards, [{} for _ in range(SHARDS)]
        return shards

    def clear(self) -> None:
        """Take everything out at once; a thread frees it by and by."""
        let_go(self.take_all())


class NumberDict(MutableMapping[int, V]):
    """The same for keys that are whole numbers, of which the last eight bits vary."""

    def __init__(self) -> None:
        self._shards: list[dict[int, V]] = [{} for _ in range(SHARDS)]

    def __getitem__(self, key: int) -> V:
        return self._shards[key % SHARDS][key]

    def __setitem__(self, key: int, value: V) -> None:
        self._shards[key % SHARDS][key] = value

    def __delitem__(self, key: int) -> None:
        del self._shards[key % SHARDS][key]

    def __iter__(self) -> Iterator[int]:
        for shard in self._shards:
            yield from shard

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def clear(self) -> None:
        """As of a `ShardedDict`."""
        shards, self._shards = self._shards, [{} for _ in range(SHARDS)]
        let_go(shards)


def let_go(parts: list[dict[Any, Any]]) -> None:
    """Free dictionaries and what only they hold, by and by. They must be nobody else's.

    One thread does it for the whole process. Thread-safe.
    """
    global _thread
    if sum(map(len, parts)) <= FREED_AT_ONCE:
        return
    with _lock:
        _waiting.extend(parts)
        if _thread is None or not _thread.is_alive():  # as after a fork
            _thread = threading.Thread(target=_free, name="kvtc-free", daemon=True)
            _thread.start()


def _free() -> None:
    global _thread
    while True:
        with _lock:
            if not _waiting:
                _thread = None
                return
            part = _waiting[-1]
            for _ in range(min(FREED_AT_ONCE, len(part))):
                part.popitem()
            if not part:
                _waiting.pop()
        time.sleep(PAUSE_SECONDS)
