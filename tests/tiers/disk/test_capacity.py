"""The cap, held for real: many chunks, sizes that lie, clocks that go back, no inodes left."""

from __future__ import annotations

import errno
import gc
import os
import time
from pathlib import Path

import pytest

from kvtc_vllm.cli import main
from kvtc_vllm.tiers.disk import DiskError, DiskStore, NamespaceRecord, count, evictor
from kvtc_vllm.tiers.disk.layout import chunk_path
from kvtc_vllm.tiers.disk.survey import Survey
from tests.reliability import disk
from tests.reliability.blobs import NAMESPACE, OTHER_NAMESPACE, blob_of, key_of
from tests.reliability.faults import WrappedFileSystem

PAGE = 4096
MANY = 20_480
"""More than eight times what a survey chooses at least."""
A, B = key_of(0), key_of(1)
RECORD = NamespaceRecord(model="m", codec="raw", dtype="bfloat16", rank=0, tp_size=1)


def small(key: bytes, namespace: bytes = NAMESPACE) -> bytes:
    return blob_of(key, namespace, longest=4000)


def open_store(root: Path, pages: int = 100, namespace: bytes = NAMESPACE, **more) -> DiskStore:
    return DiskStore(root, namespace, capacity=pages * PAGE, min_free=0, **more)


def path_of(root: Path, key: bytes, namespace: bytes = NAMESPACE) -> Path:
    return Path(chunk_path(f"{root}/{namespace.hex()}", key))


def fill(root: Path, chunks: int) -> None:
    """Chunks of one page, the first used longest ago; made without the store, which takes long."""
    open_store(root, namespace_record=RECORD).close()
    for number in range(chunks):
        path = path_of(root, key_of(number))
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, ns=(number, number))


@pytest.mark.parametrize("share", [0.5, 0.1, 0.0])
def test_gc_reaches_the_capacity(
    share: float, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(scratch / "tier", MANY)
    kept = int(share * MANY)
    assert main(["gc", str(scratch / "tier"), "--capacity", str(kept * PAGE)]) == 0
    assert f"{MANY - kept} chunks" in capsys.readouterr().out
    left = {path.name for path in disk.chunk_files(scratch / "tier")}
    assert left == {f"{key_of(number).hex()}.kvtc" for number in range(MANY - kept, MANY)}
    assert disk.ledger_bytes(scratch / "tier") == kept * PAGE


def test_gc_says_so_if_the_capacity_cannot_be_reached(
    scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = scratch / "tier"
    fill(root, 3)
    writing = open_store(root)
    temporary = writing._space.reserve(NAMESPACE.hex(), key_of(9), 2 * PAGE)
    assert main(["gc", str(root), "--capacity", "4096"]) == 1
    printed = capsys.readouterr()
    assert "3 chunks" in printed.out
    assert "4096 bytes above the capacity are left" in printed.err
    assert temporary is not None
    writing._space.abandon(NAMESPACE.hex(), temporary)
    assert main(["gc", str(root), "--capacity", "4096"]) == 0


def test_an_engine_restarts_under_a_smaller_cap(scratch: Path) -> None:
    root = scratch / "tier"
    fill(root, MANY)
    store = open_store(root, pages=MANY // 4)
    new = [key_of(MANY + n) for n in range(9)]
    for key in new:
        store.write(key, small(key))
    assert store.errors() == {}
    assert store.used() == disk.bytes_on_disk(root) <= MANY // 4 * PAGE
    assert len(disk.chunk_files(root)) == MANY // 4


def test_no_hold_of_the_lock_is_long(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in calls: files looked at, files removed."""
    monkeypatch.setattr(count, "FILES_AT_ONCE", 100)
    monkeypatch.setattr(evictor, "REMOVED_AT_ONCE", 50)
    fill(scratch / "tier", 3000)
    filesystem = WrappedFileSystem()
    store = open_store(scratch / "tier", pages=1000, filesystem=filesystem)
    filesystem.calls.clear()
    store.write(key_of(9999), small(key_of(9999)))
    store.scan()
    holds = " ".join(filesystem.calls).split("try_lock")
    assert max(hold.count("unlink") for hold in holds) <= 101
    assert max(hold.count("list") for hold in holds) < 40
    assert store.used() == disk.bytes_on_disk(scratch / "tier") == 1000 * PAGE


def test_one_survey_is_enough_for_half_of_many(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = scratch / "tier"
    fill(root, 3000)
    looked = []
    look_through = evictor.Evictor.look_through
    monkeypatch.setattr(
        evictor.Evictor, "look_through", lambda self: looked.append(1) or look_through(self)
    )
    assert Survey(root).shrink(1000 * PAGE) == (2000, 2000 * PAGE, 0)
    assert len(looked) == 1


def test_what_a_scan_and_a_survey_find_is_nothing_to_the_collector(scratch: Path) -> None:
    """A million objects that it visits stop every thread of the process."""
    fill(scratch / "tier", 100)
    store = open_store(scratch / "tier", pages=101)
    assert not any(gc.is_tracked(entry) for entry in store.scan())
    for number in (1000, 1001):
        store.write(key_of(number), small(key_of(number)))
    candidates = store._space._evictor.candidates
    assert len(candidates) == 100
    gc.collect()  # it goes through tuples once
    assert not any(gc.is_tracked(run) for run in candidates._runs)
    assert not any(gc.is_tracked(candidates.popleft()) for _ in range(100))


def test_a_count_in_steps_is_exact_while_others_change_everything(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(count, "FILES_AT_ONCE", 1)
    root = scratch / "tier"
    other = open_store(root, pages=10_000)
    for number in range(60):
        other.write(key_of(number), small(key_of(number)))
    numbers = iter(range(100, 1000))

    def disturb() -> None:
        key = key_of(next(numbers))
        other.write(key, small(key))
        for number in range(60):
            if path_of(root, key_of(number)).exists():
                other.remove([key_of(number)])
                break

    monkeypatch.setattr(count, "let_others", disturb)
    store = open_store(root, pages=10_000)
    store.scan()
    assert next(numbers) > 110
    assert store.used() == disk.ledger_bytes(root) == disk.bytes_on_disk(root)


def test_a_count_that_was_broken_off_is_finished_by_the_next(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(count, "FILES_AT_ONCE", 1)
    root = scratch / "tier"
    store = open_store(root)
    for number in range(30):
        store.write(key_of(number), small(key_of(number)))
    (root / "ledger.json").write_bytes(b"lost")

    def die() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(count, "let_others", die)
        with pytest.raises(KeyboardInterrupt):
            open_store(root).used()
    accounts = disk.ledger_accounts(root)[NAMESPACE.hex()]
    assert (accounts["known"], accounts["next"] > 0) == (False, True)
    store.remove([key_of(n) for n in range(7)])
    assert store.used() == disk.ledger_bytes(root) == 23 * PAGE


def test_removals_do_not_keep_a_count_from_ending(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a lost ledger no byte is known, so that every removal is of more than there is."""
    monkeypatch.setattr(count, "FILES_AT_ONCE", 1)
    root = scratch / "tier"
    store, other = open_store(root), open_store(root)
    for number in range(90):
        store.write(key_of(number), small(key_of(number)))
    (root / "ledger.json").write_bytes(b"lost")
    numbers = iter(range(80))
    monkeypatch.setattr(count, "let_others", lambda: other.remove([key_of(next(numbers))]))
    assert store.used() == disk.bytes_on_disk(root)


def test_a_sparse_file_costs_only_itself(scratch: Path) -> None:
    root = scratch / "tier"
    store = open_store(root, pages=256, most_bytes=PAGE)
    for number in range(50):
        store.write(key_of(number), small(key_of(number)))
    os.truncate(path_of(root, key_of(7)), 2 << 30)
    store.scan()
    assert store.counts()["repairs"] == 1
    store.write(key_of(99), small(key_of(99)))
    assert len(disk.chunk_files(root)) == 50
    assert store.take_evicted() == []
    assert store.used() == disk.bytes_on_disk(root)


def test_another_namespace_s_lies_are_told_by_its_record(scratch: Path) -> None:
    root = scratch / "tier"
    stated = NamespaceRecord(
        model="m", codec="raw", dtype="bfloat16", rank=0, tp_size=1, most_bytes=PAGE
    )
    other = open_store(root, 256, OTHER_NAMESPACE, namespace_record=stated, most_bytes=PAGE)
    store = open_store(root, pages=256)
    for number in range(50):
        store.write(key_of(number), small(key_of(number)))
        other.write(key_of(number), small(key_of(number), OTHER_NAMESPACE))
    other.close()
    os.truncate(path_of(root, key_of(7), OTHER_NAMESPACE), PAGE * 255)
    (root / "ledger.json").unlink()
    store.write(key_of(99), small(key_of(99)))
    assert len(disk.chunk_files(root)) == 100


@pytest.mark.parametrize("size", [2 * PAGE, 1 << 30])
def test_a_file_that_grew_does_not_take_others_bytes_off_the_ledger(
    size: int, scratch: Path
) -> None:
    root = scratch / "tier"
    store = open_store(root, pages=64, most_bytes=PAGE)
    for number in range(9):
        store.write(key_of(number), small(key_of(number)))
    os.truncate(path_of(root, A), size)
    with pytest.raises(DiskError, match="corrupt"):
        store.read(A)
    assert disk.ledger_bytes(root) == disk.bytes_on_disk(root) == 8 * PAGE
    for number in range(10, 210):
        store.write(key_of(number), small(key_of(number)))
        assert disk.bytes_on_disk(root) <= 64 * PAGE


def test_a_ledger_below_the_truth_is_noticed_when_more_goes_than_there_was(scratch: Path) -> None:
    root = scratch / "tier"
    store = open_store(root, pages=64)
    for number in range(9):
        store.write(key_of(number), small(key_of(number)))
    with store._space.locked() as ledger:
        ledger.account(NAMESPACE.hex()).used = PAGE
    store.remove([key_of(n) for n in range(3)])
    assert disk.ledger_accounts(root)[NAMESPACE.hex()]["known"] is False
    assert store.used() == disk.bytes_on_disk(root) == 6 * PAGE


def test_a_large_file_is_not_read(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = scratch / "tier"
    store = open_store(root, namespace_record=RECORD)
    store.write(A, small(A))
    os.truncate(path_of(root, A), 1 << 40)
    assert main(["inspect", str(root)]) == 0
    assert main(["inspect", str(path_of(root, A))]) == 2
    assert "too many" in capsys.readouterr().err
    assert main(["verify", str(root)]) == 1
    assert f"{1 << 40} bytes" in capsys.readouterr().out
    assert main(["verify", str(root), "--delete"]) == 1
    assert not path_of(root, A).exists()


def test_a_clock_that_was_set_back_turns_nothing_round(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = scratch / "tier"
    store = open_store(root, pages=40)
    for number in range(40):
        store.write(key_of(number), small(key_of(number)))
    store.close()
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() - 3600 * 10**9)
    store = open_store(root, pages=40)
    store.scan()
    store.touch([key_of(number) for number in range(20)])
    for number in range(100, 120):
        store.write(key_of(number), small(key_of(number)))
    assert sorted(store.take_evicted()) == sorted(key_of(number) for number in range(20, 40))


def test_a_time_in_the_far_future_is_not_gone_on_from(scratch: Path) -> None:
    root = scratch / "tier"
    store = open_store(root)
    store.write(A, small(A))
    os.utime(path_of(root, A), ns=(2**62, 2**62))
    store.scan()
    store.write(B, small(B))
    assert path_of(root, B).stat().st_mtime_ns < time.time_ns() + 10**9


class NoInodes(WrappedFileSystem):
    """As many files as there are, and no more."""

    full = False
    files = 0

    def perform(self, number, name, real, args):
        if name == "open" and args[1] & os.O_EXCL and self.full and self.files <= 0:
            raise OSError(errno.ENOSPC, "no inodes")
        if name == "open" and args[1] & os.O_EXCL:
            self.files -= 1
        if name == "unlink":
            self.files += 1
        return real(*args)


def test_a_volume_without_inodes_evicts_instead_of_freezing(scratch: Path) -> None:
    filesystem = NoInodes()
    store = open_store(scratch / "tier", pages=100, filesystem=filesystem)
    for number in range(20):
        store.write(key_of(number), small(key_of(number)))
    filesystem.full, filesystem.files = True, 0
    for number in range(20, 60):
        store.write(key_of(number), small(key_of(number)))
    assert store.errors() == {}
    assert store.take_evicted() == [key_of(number) for number in range(40)]


def test_a_survey_of_the_commands_shows_the_bound(scratch: Path) -> None:
    root = scratch / "tier"
    stated = NamespaceRecord(
        model="m", codec="raw", dtype="bfloat16", rank=0, tp_size=1, most_bytes=12345
    )
    open_store(root, namespace_record=stated, most_bytes=12345).close()
    (found,) = Survey(root).summaries()
    assert found.record is not None
    assert found.record.most_bytes == 12345
