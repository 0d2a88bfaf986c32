"""Sorting a million small things without keeping Python's lock from other threads.

Python gives its lock away only between two of its own instructions. One that sorts, copies or
frees a million objects keeps it for a good part of a second, so there is none here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=Any)

RUN = 1024
"""So many are sorted or freed in one go: half a millisecond."""


class Queue(Generic[T]):
    """Items that leave it in the order in which they were given. For one thread at a time.

    Python's cycle collector goes through a tuple of nothing but small values once and through a
    list or deque for ever, so they are kept in tuples.
    """

    def __init__(self, items: Iterable[T] = ()) -> None:
        source = iter(items)
        self._runs: deque[tuple[T, ...]] = deque()
        while run := tuple(islice(source, RUN)):
            self._runs.append(run)
        self._first: list[T] = []  # the next is the last

    def popleft(self) -> T:
        """The next item. Raises IndexError if there is none."""
        if not self._first:
            self._first = [*reversed(self._runs.popleft())]
        return self._first.pop()

    def __len__(self) -> int:
        return len(self._first) + sum(map(len, self._runs))

    def __bool__(self) -> bool:
        return bool(self._first or self._runs)


def in_order(items: list[T], value: Callable[[T], Any]) -> Iterator[T]:
    """The items, those of the least value first. The list is empty afterwards.

    In no order where values are equal.
    """
    total = len(items)
    if total <= 2 * RUN:
        yield from sorted(items, key=value)
        items.clear()
        return
    # A sample tells where about equal parts end.
    sample = sorted(map(value, items[:: max(1, total // RUN)][: 2 * RUN]))
    ends = sample[:: max(1, len(sample) * RUN // (2 * total))]
    parts: list[list[T]] = [[] for _ in range(len(ends) + 1)]
    while items:
        item = items.pop()
        parts[bisect_right(ends, value(item))].append(item)
    parts.reverse()
    try:
        while parts:
            part = parts.pop()
            if len(part) == total:  # all are equal, or nearly
                yield from sorted(part, key=value)
            else:
                yield from in_order(part, value)
    finally:
        while parts:  # where only the first were wanted
            parts.pop()
