"""Sorting a million small things without keeping Python's lock from other threads."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T", bound=Any)

RUN = 2048
"""So many are sorted in one call, which no other thread can interrupt: about a millisecond."""


def in_order(items: list[T]) -> Iterator[T]:
    """The items, least first, as `sorted` has them."""
    if len(items) <= RUN:
        yield from sorted(items)
        return
    step = max(1, len(items) // RUN)
    # A sample tells where about equal parts end.
    sample = sorted(items[::step][: 2 * RUN])
    ends = sample[:: max(1, len(sample) * RUN // (2 * len(items)))]
    parts: list[list[T]] = [[] for _ in range(len(ends) + 1)]
    for item in items:
        parts[bisect_right(ends, item)].append(item)
    for part in parts:
        if len(part) == len(items):  # all are equal, or nearly
            yield from sorted(part)
        else:
            yield from in_order(part)
