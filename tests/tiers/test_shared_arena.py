"""The arena that other processes read: pages, places, and what becomes of slips."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvtc_vllm.tiers.blob_store import StoreError
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.shared_arena import PAGE, SharedArena, SharedView, page_bytes

ROOM = 64


@pytest.fixture
def arena() -> Iterator[SharedArena]:
    made = SharedArena(ROOM * PAGE)
    yield made
    made.close()


@pytest.fixture
def view(arena: SharedArena) -> Iterator[SharedView]:
    made = SharedView(os.dup(arena.fd), arena.capacity)
    yield made
    made.close()


def key(number: int) -> RecordKey:
    return RecordKey(b"%d" % number)


def place(arena: SharedArena, number: int) -> int:
    ((_, found),) = arena.places([key(number)])
    return found


def test_everybody_reads_what_was_written(arena: SharedArena, view: SharedView) -> None:
    """Whatever was written and freed before, and never more than there is room for."""
    numbers, held = random.Random(0), dict[RecordKey, bytes]()
    refused = 0
    for _ in range(2000):
        name = key(numbers.randrange(20))
        if numbers.random() < 0.3:
            assert arena.remove([name]) == (name in held)
            held.pop(name, None)
            continue
        blob = numbers.randbytes(numbers.randrange(1, 12 * PAGE))
        others = sum(page_bytes(len(b)) for n, b in held.items() if n != name)
        if others + page_bytes(len(blob)) > arena.capacity:
            refused += 1
            with pytest.raises(StoreError, match="full"):
                arena.write(name, blob)
        else:
            assert arena.write(name, blob) == page_bytes(len(blob))
            held[name] = blob
        assert arena.used == sum(page_bytes(len(b)) for b in held.values())
        assert set(arena.keys()) == set(held)
        for name, where in arena.places(held):
            assert view.read_at(where) == held[name]
    assert refused > 20
    assert bytes(arena.read(next(iter(held)))) in held.values()


def test_another_process_reads_it(arena: SharedArena) -> None:
    blob = os.urandom(5 * PAGE + 7)
    arena.write(key(0), blob)
    program = (
        "import sys; from kvtc_vllm.tiers.shared_arena import SharedView\n"
        "fd, capacity, place = map(int, sys.argv[1:])\n"
        "sys.stdout.buffer.write(SharedView(fd, capacity).read_at(place))"
    )
    words = [str(word) for word in (arena.fd, arena.capacity, place(arena, 0))]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        pass_fds=[arena.fd],
        capture_output=True,
        check=True,
    )
    assert done.stdout == blob


def test_a_freed_place_is_read_without_an_error_or_is_missing(
    arena: SharedArena, view: SharedView
) -> None:
    """Nothing is promised of its bytes: whoever decodes them finds out."""
    numbers = random.Random(1)
    stale = []
    for number in range(200):
        arena.write(key(number), numbers.randbytes(numbers.randrange(1, 20 * PAGE)))
        stale.append(place(arena, number))
        arena.remove([key(numbers.randrange(number + 1)), key(number - 2)])
        for where in stale:
            length = where & 0xFFFFFFFF
            with contextlib.suppress(StoreError):
                assert len(view.read_at(where)) == length


@pytest.mark.parametrize(
    "where", [0, 1, 1 << 32, (ROOM + 1) << 32 | 5, 1 << 32 | (ROOM * PAGE + 1), 1 << 62 | 9, -1]
)
def test_no_place_at_all_is_missing(arena: SharedArena, view: SharedView, where: int) -> None:
    arena.write(key(0), b"something")
    if where == 1 << 32 | (ROOM * PAGE + 1):
        arena.write(key(1), bytes((ROOM - 1) * PAGE))
    with pytest.raises(StoreError, match="missing"):
        view.read_at(where)


def test_what_is_written_again_takes_no_more_room(arena: SharedArena) -> None:
    for size in (ROOM * PAGE, PAGE, ROOM * PAGE):
        arena.write(key(0), bytes(size))
        assert arena.used == size
    with pytest.raises(StoreError, match="full"):
        arena.write(key(0), bytes(ROOM * PAGE + 1))
    assert arena.read(key(0)) == bytes(ROOM * PAGE)


def test_a_machine_without_memory_keeps_nothing(
    arena: SharedArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena.write(key(0), b"a" * 3 * PAGE)

    def full(*args: object) -> int:
        raise OSError(28, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StoreError, match="full"):
            arena.write(key(1), b"b" * 2 * PAGE)
    assert arena.keys() == [key(0)]
    assert arena.used == 3 * PAGE
    arena.write(key(1), b"b" * (ROOM - 3) * PAGE)
    assert arena.read(key(0)) == b"a" * 3 * PAGE


def test_cleared_it_is_as_new(arena: SharedArena) -> None:
    arena.write(key(0), bytes(ROOM * PAGE))
    arena.clear()
    assert arena.used == len(arena) == 0
    with pytest.raises(StoreError, match="missing"):
        arena.read(key(0))
    arena.write(key(1), b"b" * ROOM * PAGE)
    assert arena.read(key(1)) == b"b" * ROOM * PAGE
