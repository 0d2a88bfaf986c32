"""Sorting in runs: the order of `sorted`, and no call that sorts much at once."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterable
from itertools import islice

import pytest

from kvtc_vllm.tiers.disk import sorting
from kvtc_vllm.tiers.disk.sorting import Queue, in_order

MANY = 20 * sorting.RUN

SHAPES: dict[str, Callable[[random.Random], list[int]]] = {
    "random": lambda chance: [chance.randrange(10**9) for _ in range(MANY)],
    "sorted": lambda chance: list(range(MANY)),
    "reversed": lambda chance: list(range(MANY, 0, -1)),
    "equal": lambda chance: [7] * MANY,
    "few values": lambda chance: [chance.randrange(3) for _ in range(MANY)],
    "one large part": lambda chance: [max(0, chance.randrange(-(10**6), 100)) for _ in range(MANY)],
    "saw": lambda chance: [number % (sorting.RUN + 1) for number in range(MANY)],
    "few": lambda chance: [3, 1, 2],
    "none": lambda chance: [],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_is_that_of_sorted(shape: str) -> None:
    items = SHAPES[shape](random.Random(1))
    expected = sorted(items)
    assert list(in_order(items, lambda item: item)) == expected
    assert items == []


def test_the_order_is_that_of_the_values() -> None:
    items = [(number % 977, MANY - number) for number in range(MANY)]
    values = [value for value, _ in in_order(list(items), lambda item: item[0])]
    assert values == sorted(value for value, _ in items)


def test_the_first_of_many() -> None:
    items = SHAPES["random"](random.Random(1))
    expected = sorted(items)[:100]
    assert list(islice(in_order(items, lambda item: item), 100)) == expected


@pytest.mark.parametrize("shape", ["random", "sorted", "reversed", "saw"])
def test_no_call_sorts_much(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def recorded(items: Iterable[int], key: Callable[[int], int] | None = None) -> list[int]:
        found = sorted(items, key=key)
        lengths.append(len(found))
        return found

    monkeypatch.setattr(sorting, "sorted", recorded, raising=False)
    assert len(list(in_order(SHAPES[shape](random.Random(2)), lambda item: item))) == MANY
    assert max(lengths) <= 2 * sorting.RUN


@pytest.mark.parametrize("number", [0, 1, sorting.RUN, 3 * sorting.RUN + 7])
def test_a_queue_is_first_in_first_out(number: int) -> None:
    queue = Queue(iter(range(number)))
    for place in range(number):
        assert (len(queue), bool(queue)) == (number - place, True)
        assert queue.popleft() == place
    assert (len(queue), bool(queue)) == (0, False)
    with pytest.raises(IndexError):
        queue.popleft()


def test_a_queue_holds_no_more_in_one_object_than_is_freed_in_one_go() -> None:
    """And after its first look the collector does not go through them again."""
    queue = Queue(range(MANY))
    queue.popleft()
    assert max(map(len, [queue._first, *queue._runs])) <= sorting.RUN
    gc.collect()
    assert not any(gc.is_tracked(run) for run in queue._runs)
