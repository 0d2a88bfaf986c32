"""The list of files that a start reads: right, wrong, old, foreign, half written."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from kvtc_vllm.tiers.disk import DiskError, DiskStore, disk_bytes, file_list, store
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem
from kvtc_vllm.tiers.disk.layout import LIST_FILE, NEW_LIST_FILE
from tests.reliability.blobs import NAMESPACE, OTHER_NAMESPACE, blob_of, key_of
from tests.reliability.faults import FaultyFileSystem, KillingFileSystem, WrappedFileSystem

FILES = 40


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LISTED_FROM", 1)


def opened(root: Path, namespace: bytes = NAMESPACE, **more) -> DiskStore:
    more.setdefault("min_free", 0)
    return DiskStore(root, namespace, capacity=2**30, **more)


def filled(root: Path, files: int = FILES, namespace: bytes = NAMESPACE) -> DiskStore:
    """A store with chunks of several sizes, all in few directories."""
    made = opened(root, namespace)
    for number in range(files):
        key = keyed(number)
        made.write(key, blob_of(key, namespace, longest=3 * 4096))
    return made


def keyed(number: int) -> bytes:
    return bytes([number % 3]) + key_of(number)[1:]


def keep(of: DiskStore) -> bool:
    return of.keep_list(time.monotonic() + 60)


def place(root: Path, name: str = LIST_FILE, namespace: bytes = NAMESPACE) -> Path:
    return root / namespace.hex() / name


def as_it_is(root: Path, namespace: bytes = NAMESPACE) -> list[tuple[bytes, int]]:
    """Key and bytes of what is there, oldest first, from the files themselves."""
    files = (root / namespace.hex()).glob("??/*.kvtc")
    rows = [(f.stat().st_mtime_ns, bytes.fromhex(f.stem), f.stat().st_size) for f in files]
    return [(key, disk_bytes(size)) for _, key, size in sorted(rows)]


def found(root: Path, **more) -> tuple[list[tuple[bytes, int]], DiskStore, list[str]]:
    """What a start lists, its store, and the calls that it made for that."""
    filesystem = WrappedFileSystem()
    again = opened(root, filesystem=filesystem, **more)
    filesystem.calls.clear()
    entries = [(entry.key, entry.size) for entry in again.scan()]
    calls = list(filesystem.calls)
    assert again.used() == sum(size for _, size in as_it_is(root))
    return entries, again, calls


def test_a_start_does_not_ask_for_files_that_the_list_knows(scratch: Path) -> None:
    first = filled(scratch)
    assert keep(first)
    assert not keep(first)  # nothing has changed
    entries, again, calls = found(scratch)
    assert entries == as_it_is(scratch)
    assert len(entries) == FILES
    assert calls.count("names") == 3
    assert calls.count("stat") < 8
    # Of directories above the chunks only.
    assert calls.count("list") <= 4
    assert again.counts().get("repairs", 0) == 0
    assert again.read(keyed(5)) == first.read(keyed(5))


def test_what_changed_since_is_asked_for(scratch: Path) -> None:
    first = filled(scratch)
    assert keep(first)
    others = opened(scratch)
    for number in (FILES, FILES + 1, FILES + 2):
        others.write(keyed(number), blob_of(keyed(number), longest=9 * 4096))
    others.remove([keyed(0), keyed(1)])
    # One that is made anew, of another size: for a while both files exist, so that it gets
    # another inode.
    path = scratch / NAMESPACE.hex() / "02" / f"{keyed(2).hex()}.kvtc"
    os.rename(path, scratch / "old")
    path.write_bytes(bytes(7 * 4096 + 1))
    others.close()
    entries, _, calls = found(scratch)
    assert sorted(entries) == sorted(as_it_is(scratch))
    assert calls.count("stat") < 12
    assert "list" in calls


def test_a_directory_of_which_little_is_known_is_asked_for_as_a_whole(scratch: Path) -> None:
    first = filled(scratch, 9)
    assert keep(first)
    for number in range(9, FILES):
        first.write(keyed(number), blob_of(keyed(number)))
    entries, _, calls = found(scratch)
    assert entries == as_it_is(scratch)
    assert calls.count("stat") < 8


def test_recency_is_that_of_the_list(scratch: Path) -> None:
    first = filled(scratch)
    first.touch([keyed(3)])
    assert keep(first)
    entries, again, _ = found(scratch)
    assert entries[-1][0] == keyed(3)
    again.touch([keyed(0)])
    entries, again, _ = found(scratch)
    assert entries[-1][0] == keyed(3)  # not told of yet
    again.touch([keyed(0)])
    assert keep(again)
    entries, _, _ = found(scratch)
    assert entries[-1][0] == keyed(0)


def test_every_byte_of_the_list_may_be_wrong(scratch: Path) -> None:
    keep(filled(scratch, 6))
    path = place(scratch)
    sound = path.read_bytes()
    truth = as_it_is(scratch)
    # Of the zeros between head and sections, some.
    for at in [*range(40), *range(100, 8300, 97), *range(12288, len(sound), 3)]:
        for value in (sound[at] ^ 1, sound[at] ^ 0xFF):
            path.write_bytes(sound[:at] + bytes([value]) + sound[at + 1 :])
            again = opened(scratch)
            assert [(entry.key, entry.size) for entry in again.scan()] == truth
            told = again.counts().get("repairs", 0)
            assert told == (at < 8240 or at >= 12288)
            again.close()
    for length in (0, 1, 31, 8240, 12287, 12288, len(sound) - 1):
        path.write_bytes(sound[:length])
        entries, again, _ = found(scratch)
        assert entries == truth
        assert again.counts()["repairs"] == 1


def test_a_list_that_tells_lies_with_a_right_checksum_frees_nobody_s_room(scratch: Path) -> None:
    """Sizes that no chunk has, as of a file that was made longer: the file goes, as without."""
    first = filled(scratch, 6)
    longest = scratch / NAMESPACE.hex() / "00" / f"{keyed(0).hex()}.kvtc"
    os.truncate(longest, 2**31)
    assert keep(first)
    again = opened(scratch, most_bytes=16 * 4096)
    assert len(again.scan()) == 5
    assert not longest.exists()
    assert again.used() == sum(size for _, size in as_it_is(scratch))


def test_the_list_of_another_namespace_is_not_believed(scratch: Path) -> None:
    keep(filled(scratch))
    keep(filled(scratch, 5, OTHER_NAMESPACE))
    os.replace(place(scratch, namespace=OTHER_NAMESPACE), place(scratch))
    entries, again, _ = found_of_both(scratch)
    assert entries == as_it_is(scratch)
    assert again.counts()["repairs"] == 1
    assert keep(again)
    assert found_of_both(scratch)[1].counts().get("repairs", 0) == 0


def found_of_both(root: Path) -> tuple[list[tuple[bytes, int]], DiskStore, None]:
    again = opened(root)
    return [(entry.key, entry.size) for entry in again.scan()], again, None


@pytest.mark.parametrize("name", [LIST_FILE, NEW_LIST_FILE])
@pytest.mark.parametrize("kind", ["pipe", "link", "dangling", "directory", "name"])
def test_something_else_in_the_list_s_place(kind: str, name: str, scratch: Path) -> None:
    first = filled(scratch, 6)
    outside = scratch.parent / f"{scratch.name}-outside"
    outside.write_bytes(b"mine")
    path = place(scratch, name)
    try:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(outside)
        elif kind == "dangling":
            path.symlink_to(scratch.parent / "nothing-there")
        elif kind == "name":
            os.link(outside, path)
        else:
            path.mkdir()
        entries, again, _ = found(scratch)
        assert entries == as_it_is(scratch)
        if name == NEW_LIST_FILE or kind == "directory":
            with pytest.raises(DiskError):
                keep(again)
            assert first.errors() == {}
        else:
            assert keep(again)  # in its place
            assert found(scratch)[1].counts().get("repairs", 0) == 0
        assert outside.read_bytes() == b"mine"
        assert not (scratch.parent / "nothing-there").exists()
    finally:
        outside.unlink()


def test_a_kill_at_any_call_leaves_a_right_list_or_none(scratch: Path) -> None:
    first = filled(scratch, 6)
    assert keep(first)
    for number in range(6, 9):
        first.write(keyed(number), blob_of(keyed(number)))
    truth = as_it_is(scratch)
    for after in (False, True):
        for at in range(1, 40):
            if not dies(partial(write_with, KillingFileSystem(at, after), scratch)):
                break
            entries, again, _ = found(scratch)
            assert entries == truth
            assert again.counts().get("repairs", 0) == 0
        else:
            pytest.fail("it never ends")
        assert at > 10
    assert keep(opened_and_scanned(scratch))


def test_an_error_at_any_call_is_told_and_leaves_a_right_list_or_none(scratch: Path) -> None:
    assert keep(filled(scratch, 6))
    truth = as_it_is(scratch)
    for at in range(1, 40):
        filesystem = FaultyFileSystem(28, at)
        with suppress(DiskError):
            write_with(filesystem, scratch)
        entries, again, _ = found(scratch)
        assert entries == truth
        assert again.counts().get("repairs", 0) == 0
        if not filesystem.injected:
            break
    assert at > 10


def dies(call: Callable[[], None]) -> bool:
    """Whether a process that makes this call is killed by it."""
    child = os.fork()
    if not child:
        call()
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def write_with(filesystem, root: Path) -> None:
    fs = CheckedFileSystem(filesystem)
    file_list.write(fs, f"{root}/{NAMESPACE.hex()}", NAMESPACE, time.monotonic() + 60)


def opened_and_scanned(root: Path) -> DiskStore:
    again = opened(root)
    again.scan()
    return again


def test_it_is_given_up_in_time_and_leaves_nothing(scratch: Path) -> None:
    first = filled(scratch)
    assert not first.keep_list(time.monotonic())
    assert not place(scratch).exists()
    assert not place(scratch, NEW_LIST_FILE).exists()
    assert keep(first)  # what had changed is still known to have


def test_one_process_writes_it_at_a_time(scratch: Path) -> None:
    first = filled(scratch)
    with open(place(scratch, NEW_LIST_FILE), "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not keep(first)
    assert keep(first)


def test_few_chunks_need_no_list(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LISTED_FROM", FILES + 1)
    first = filled(scratch)
    assert not keep(first)
    first.write(keyed(FILES), blob_of(keyed(FILES)))
    assert keep(first)
    assert opened(scratch).drop() == FILES + 1
    assert not place(scratch).parent.exists()
