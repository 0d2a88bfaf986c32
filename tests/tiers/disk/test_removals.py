"""What one process removes, the others that have the namespace open learn."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kvtc_vllm.tiers.disk import DiskError, DiskStore, removal_log
from kvtc_vllm.tiers.disk.survey import Survey
from tests.reliability.blobs import NAMESPACE, OTHER_NAMESPACE, blob_of, key_of
from tests.reliability.kill9 import fork

PAGE = 4096
A, B, C, D = (key_of(n) for n in range(4))


def small(key: bytes, namespace: bytes = NAMESPACE) -> bytes:
    return blob_of(key, namespace, longest=4000)


def open_store(root: Path, pages: int = 100, namespace: bytes = NAMESPACE) -> DiskStore:
    store = DiskStore(root, namespace, capacity=pages * PAGE, min_free=0)
    store.scan()
    return store


def log_of(root: Path) -> Path:
    return root / NAMESPACE.hex() / "removals"


def test_evictions_and_removals_by_anybody_are_told(tmp_path: Path) -> None:
    store = open_store(tmp_path, pages=3)
    for key in (A, B, C):
        store.write(key, small(key))
    assert store.take_removed() == []
    of_another_namespace = open_store(tmp_path, 3, OTHER_NAMESPACE)
    of_another_namespace.write(A, small(A, OTHER_NAMESPACE))  # evicts A
    assert store.take_removed() == [A]
    replica = open_store(tmp_path, pages=3)
    replica.remove([C])
    assert Survey(tmp_path).remove(NAMESPACE.hex(), [B]) == 1
    assert store.take_removed() == [C, B]
    assert store.take_removed() == []
    assert replica.take_removed() == [C, B]
    assert of_another_namespace.take_removed() == []


def test_what_is_there_again_is_not_told(tmp_path: Path) -> None:
    store, replica = open_store(tmp_path), open_store(tmp_path)
    for key in (A, B):
        store.write(key, small(key))
    replica.remove([A, B])
    replica.write(A, small(A))
    assert store.take_removed() == [B]


def test_what_was_removed_before_the_scan_is_not_told(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write(A, small(A))
    store.remove([A])
    assert open_store(tmp_path).take_removed() == []


def test_a_full_log_is_begun_anew_and_nothing_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal_log, "MAX_LOG_BYTES", 300)
    store, replica = open_store(tmp_path), open_store(tmp_path)
    told = []
    for number in range(60):
        key = key_of(number)
        store.write(key, small(key))
        replica.remove([key])
        if number % 7 == 0:
            told += store.take_removed()
    told += store.take_removed()
    assert told == [key_of(number) for number in range(60)]
    assert log_of(tmp_path).stat().st_size <= 300 + 33


def test_who_did_not_look_for_too_long_goes_on_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal_log, "MAX_LOG_BYTES", 300)
    store, replica = open_store(tmp_path), open_store(tmp_path)
    for number in range(60):
        key = key_of(number)
        store.write(key, small(key))
        replica.remove([key])
    told = store.take_removed()
    assert told == [key_of(number) for number in range(60 - len(told), 60)]
    assert told


@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 50, b"\x20half", b"\x01" * 999])
def test_a_damaged_log_tells_nothing_wrong(content: bytes, tmp_path: Path) -> None:
    store, replica = open_store(tmp_path), open_store(tmp_path)
    for key in (A, B, C):
        store.write(key, small(key))
    log_of(tmp_path).write_bytes(content)
    assert not {A, B, C} & set(store.take_removed())
    replica.remove([A])
    store.take_removed()
    replica.remove([B])
    assert B in store.take_removed() or content in (b"\0", b"\x20half")
    assert store.read(C) == small(C)


def test_a_namespace_that_is_dropped_leaves_no_log(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write(A, small(A))
    store.remove([A])
    assert log_of(tmp_path).exists()
    store.drop()
    assert not (tmp_path / NAMESPACE.hex()).exists()


def hold_the_lock_and_fork(root: Path, writing: int) -> None:
    """Tells the child's number, and the reason for which it cannot read."""
    store = open_store(root)
    with store._space.locked():
        if os.fork() == 0:
            with pytest.raises(DiskError) as caught:
                store.read(A)
            os.write(writing, f"{os.getpid()} {caught.value.reason}".encode())
        signal.pause()


def test_a_forked_child_cannot_use_the_store_and_keeps_no_lock(tmp_path: Path) -> None:
    """A child that outlives its killed parent would hold the root's lock for ever."""
    reading, writing = os.pipe()
    parent = fork(hold_the_lock_and_fork, tmp_path, writing)
    os.close(writing)
    child, reason = os.read(reading, 100).split()
    os.close(reading)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        assert reason == b"closed"
        store = open_store(tmp_path)
        store.write(A, small(A))
        assert store.read(A) == small(A)
    finally:
        os.kill(int(child), signal.SIGKILL)
