"""A fault at the Nth call, for every N and every kind: only DiskError, and never a wrong blob."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtc_vllm.tiers.disk import DiskError, DiskStore, FileSystem, NamespaceRecord
from tests.reliability import disk
from tests.reliability.blobs import NAMESPACE, blob_of, key_of, twin_of
from tests.reliability.faults import FAULTS, SHORT, FaultyFileSystem, WrappedFileSystem

CAPACITY = 4 * 4096
RECORD = NamespaceRecord(model="m", codec="raw", dtype="bfloat16", rank=0, tp_size=1)
KEYS = [key_of(number) for number in range(6)]


REFERENCES = os.environ.get("KVTC_DISK") == "all"
"""Whether every fault is tried on references as well: `make test-disk`."""


def blob(key: bytes) -> bytes:
    return blob_of(key, longest=4000)


def twin(key: bytes) -> bytes:
    """Of two blocks, whose body all have."""
    return twin_of(key, longest=8000, bodies=1)


class Session:
    """A caller that treats every DiskError as a miss and counts it.

    shared: it writes chunks with one body.
    """

    def __init__(self, root: Path, filesystem: FileSystem, shared: bool = False) -> None:
        self.blob = twin if shared else blob
        self.tenant = b"one" if shared else b""
        self.misses = 0
        self.served = 0
        self.store: DiskStore | None = None
        try:
            self.store = DiskStore(
                root,
                NAMESPACE,
                capacity=CAPACITY,
                min_free=0,
                namespace_record=RECORD,
                filesystem=filesystem,
                lock_wait_seconds=0.05,
            )
        except DiskError:
            self.misses += 1

    def run(self) -> None:
        """Four chunks fit, so the last writes evict."""
        store = self.store
        if store is None:
            return
        self.attempt(store.scan)
        for key in KEYS[:5]:
            self.attempt(lambda key=key: store.write(key, self.blob(key), self.tenant))
        store.touch(KEYS[2:4])
        for key in KEYS:
            self.attempt(lambda key=key: self.read(key))
        self.attempt(lambda: store.remove([KEYS[1], KEYS[3]]))
        self.attempt(lambda: store.write(KEYS[5], self.blob(KEYS[5]), self.tenant))
        self.attempt(lambda: self.read(KEYS[5]))
        self.attempt(store.scan)
        self.attempt(store.used)
        store.take_evicted()
        store.close()

    def read(self, key: bytes) -> None:
        assert self.store is not None
        assert self.store.read(key) == self.blob(key)
        self.served += 1

    def attempt(self, operation: Callable[[], object]) -> None:
        assert self.store is not None
        before = sum(self.store.errors().values())
        try:
            operation()
        except DiskError:
            self.misses += 1
            counted = sum(self.store.errors().values())
            if counted == before:
                raise AssertionError("a miss that nothing counts") from None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Session]:
    """The calls of a session without faults, and how it went."""
    counting = WrappedFileSystem()
    session = Session(tmp_path_factory.mktemp("plain") / "tier", counting)
    session.run()
    assert session.served == 5  # the evicted one is missing
    return counting.calls, session


def check_healed(root: Path, where: str, blob: Callable[[bytes], bytes] = blob) -> None:
    """The next engine on the same root finds a sound tier."""
    store = DiskStore(root, NAMESPACE, capacity=CAPACITY, min_free=0)
    for entry in store.scan():
        assert store.read(entry.key) == blob(entry.key), where
    assert disk.temporaries(root) == [], where
    assert disk.ledger_bytes(root) == disk.bytes_on_disk(root) <= CAPACITY, where
    store.write(KEYS[0], blob(KEYS[0]))
    assert store.read(KEYS[0]) == blob(KEYS[0]), where
    assert store.errors() == {}, where
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lasting"), [*((kind, False) for kind in FAULTS), ("EIO", True), (SHORT, True)]
)
def test_a_fault_at_every_call(
    kind: str, lasting: bool, scratch: Path, undisturbed: tuple[list[str], Session]
) -> None:
    calls, usual = undisturbed
    descriptors = disk.open_descriptors()
    root = scratch / "tier"
    for first, call in enumerate(calls, 1):
        if kind == SHORT and call not in ("pread", "pwrite"):
            continue
        filesystem = FaultyFileSystem(FAULTS[kind], first, lasting)
        session = Session(root, filesystem)
        session.run()
        where = f"{kind} at call {first}: {call}"
        assert filesystem.injected or kind == SHORT, where  # an empty file has no short read
        assert disk.bytes_on_disk(root) <= CAPACITY, where
        assert disk.open_descriptors() == descriptors, where
        if kind in ("EINTR", SHORT):
            assert (session.misses, session.served) == (usual.misses, usual.served), where
        check_healed(root, where)
        shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lasting", "step"),
    [
        ("EIO", False, 1 if REFERENCES else 5),
        *((kind, False, 1) for kind in FAULTS if REFERENCES and kind != "EIO"),
        *([("EIO", True, 1), (SHORT, True, 1)] if REFERENCES else []),
    ],
)
def test_a_fault_at_every_call_of_references(
    kind: str, lasting: bool, step: int, scratch: Path
) -> None:
    """step: every how many calls one fails."""
    counting = WrappedFileSystem()
    usual = Session(scratch / "plain", counting, shared=True)
    usual.run()
    assert counting.calls.count("link") >= 4
    descriptors = disk.open_descriptors()
    root = scratch / "tier"
    for first in range(1, len(counting.calls) + 1, step):
        call = counting.calls[first - 1]
        if kind == SHORT and call not in ("pread", "pwrite"):
            continue
        filesystem = FaultyFileSystem(FAULTS[kind], first, lasting)
        session = Session(root, filesystem, shared=True)
        session.run()
        where = f"{kind} at call {first}: {call}"
        assert filesystem.injected or kind == SHORT, where
        assert disk.bytes_on_disk(root) <= CAPACITY, where
        assert disk.open_descriptors() == descriptors, where
        if kind in ("EINTR", SHORT):
            assert (session.misses, session.served) == (usual.misses, usual.served), where
        check_healed(root, where, twin)
        shutil.rmtree(root)


def test_an_endless_interruption_ends(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="interrupted"):
        DiskStore(tmp_path, NAMESPACE, filesystem=FaultyFileSystem(errno.EINTR, 1, lasting=True))


def test_writes_on_a_full_disk_leave_nothing_and_cost_at_most_one_chunk(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, NAMESPACE, capacity=CAPACITY, min_free=0)
    for key in KEYS[:2]:
        store.write(key, blob(key))
    full = DiskStore(
        tmp_path,
        NAMESPACE,
        capacity=CAPACITY,
        min_free=0,
        filesystem=FailingWrites(),
    )
    # The first one evicts the oldest, as that may help; when it does not, others evict nothing.
    for _ in range(2):
        with pytest.raises(DiskError, match="no_space"):
            full.write(KEYS[2], blob(KEYS[2]))
    assert full.take_evicted() == [KEYS[0]]
    assert full.errors() == {("write", "no_space"): 2}
    assert disk.temporaries(tmp_path) == []
    assert store.used() == disk.bytes_on_disk(tmp_path)
    assert full.read(KEYS[1]) == blob(KEYS[1])
    with pytest.raises(DiskError, match="missing"):
        full.read(KEYS[2])


class FailingWrites(WrappedFileSystem):
    """No room for chunk data; the ledger's block is allocated already."""

    def perform(self, number, name, real, args):
        if name == "pwrite" and bytes(args[1][:4]) == b"KVTC":
            raise OSError(errno.ENOSPC, "no space")
        return real(*args)
