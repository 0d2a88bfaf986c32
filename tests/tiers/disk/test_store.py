"""One store, and two on one root: publication, identity, recency, cap, restart."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
import xxhash

from kvtc_vllm.codec import container
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.tiers.disk import DiskError, DiskStore, NamespaceRecord, disk_bytes, layout
from kvtc_vllm.tiers.disk.checked import CheckedFileSystem
from kvtc_vllm.tiers.disk.filesystem import OsFileSystem
from kvtc_vllm.tiers.disk.ledger import Ledger
from tests.codec.synthetic import SyntheticModel
from tests.reliability import disk
from tests.reliability.blobs import NAMESPACE, OTHER_NAMESPACE, blob_of, key_of
from tests.reliability.faults import WrappedFileSystem

A, B, C, D = (key_of(n) for n in range(4))
PAGE = 4096


def small(key: bytes, namespace: bytes = NAMESPACE) -> bytes:
    """A blob that takes one block."""
    return blob_of(key, namespace, longest=4000)


def open_store(root: Path, namespace: bytes = NAMESPACE, pages: int = 100, **more) -> DiskStore:
    more.setdefault("min_free", 0)
    return DiskStore(root, namespace, capacity=pages * PAGE, **more)


def reason(operation, *arguments) -> str:
    with pytest.raises(DiskError) as caught:
        operation(*arguments)
    return caught.value.reason


def writes_chunk(name: str, args: tuple) -> bool:
    return name == "pwrite" and bytes(args[1][:4]) == b"KVTC"


def path_of(root: Path, key: bytes, namespace: bytes = NAMESPACE) -> Path:
    return root / namespace.hex() / key.hex()[:2] / f"{key.hex()}.kvtc"


def test_what_was_written_is_read(tmp_path: Path) -> None:
    store = open_store(tmp_path / "new" / "root")
    size = store.write(A, blob_of(A))
    assert size == disk_bytes(len(blob_of(A))) == store.used()
    assert store.read(A) == blob_of(A)
    assert [(e.key, e.size) for e in store.scan()] == [(A, size)]
    assert reason(store.read, B) == "missing"
    assert store.remove([A, B]) == 1
    assert (reason(store.read, A), store.used(), store.scan()) == ("missing", 0, [])
    assert store.counts()["writes"] == store.counts()["reads"] == 1
    assert store.errors() == {("read", "missing"): 2}


def test_blobs_of_the_codec_carry_the_store_s_seal(tmp_path: Path) -> None:
    model = SyntheticModel(
        num_layers=2, num_kv_heads=1, head_size=16, layer_groups=((0, 2),), max_positions=64
    )
    blob = RawCodec(model.geometry, torch.bfloat16, NAMESPACE).encode(*model.chunk(8), 0, A)
    store = open_store(tmp_path)
    store.write(A, blob)
    assert store.read(A) == blob
    assert reason(store.write, B, blob) == "foreign"
    assert layout.MIN_BLOB_BYTES == container.MIN_BLOB_BYTES
    assert container.parse(blob).header.identity == blob[layout.IDENTITY_OFFSET :][:16]


def test_nothing_of_another_namespace_or_key_is_served(tmp_path: Path) -> None:
    store, other = open_store(tmp_path), open_store(tmp_path, OTHER_NAMESPACE)
    other.write(A, small(A, OTHER_NAMESPACE))
    assert reason(store.read, A) == "missing"
    assert reason(store.write, A, small(A, OTHER_NAMESPACE)) == "foreign"
    for source, target in (
        (path_of(tmp_path, A, OTHER_NAMESPACE), path_of(tmp_path, A)),
        (path_of(tmp_path, A, OTHER_NAMESPACE), path_of(tmp_path, B)),
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    assert (reason(store.read, A), reason(store.read, B)) == ("foreign", "foreign")
    assert not path_of(tmp_path, A).exists()
    assert other.read(A) == small(A, OTHER_NAMESPACE)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer", "zeros"])
def test_a_damaged_file_is_a_miss_and_goes(damage: str, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write(A, blob_of(A))
    path = path_of(tmp_path, A)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(
        {
            "flip": content,
            "cut": content[:-1],
            "empty": b"",
            "longer": content + b"\0",
            "zeros": bytes(len(content)),
        }[damage]
    )
    assert reason(store.read, A) == "corrupt"
    assert reason(store.read, A) == "missing"
    store.write(A, blob_of(A))
    assert store.read(A) == blob_of(A)


def test_a_blob_that_is_none_is_not_written(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert reason(store.write, A, blob_of(A)[:-1]) == "corrupt"
    assert reason(store.write, A, b"") == "corrupt"
    assert reason(store.write, b"", blob_of(b"")) == "key"
    assert reason(store.read, bytes(101)) == "key"
    longest = bytes(range(100))
    store.write(longest, blob_of(longest))
    assert [entry.key for entry in store.scan()] == [longest]


def test_two_writers_of_one_key_of_which_one_fails(tmp_path: Path) -> None:
    """LMCache#4991: a failed store stayed visible, because both used one staging name."""
    first_waits, second_done = threading.Event(), threading.Event()

    class Interleaved(WrappedFileSystem):
        def perform(self, number, name, real, args):
            if writes_chunk(name, args):
                first_waits.set()
                second_done.wait(10)
                real(args[0], args[1][:100], args[2])
                raise OSError(5, "the disk fails half-way")
            return real(*args)

    slow = open_store(tmp_path, filesystem=Interleaved())
    fast = open_store(tmp_path)
    outcome: list[str] = []
    thread = threading.Thread(target=lambda: outcome.append(reason(slow.write, A, blob_of(A))))
    thread.start()
    first_waits.wait(10)
    assert reason(fast.read, A) == "missing"  # nothing shows before it is whole
    fast.write(A, blob_of(A))
    second_done.set()
    thread.join(10)
    assert outcome == ["io"]
    assert fast.read(A) == slow.read(A) == blob_of(A)
    assert disk.temporaries(tmp_path) == []
    assert fast.used() == disk.bytes_on_disk(tmp_path)


def test_the_second_of_two_writers_is_dropped_and_counted_once(tmp_path: Path) -> None:
    one, two = open_store(tmp_path), open_store(tmp_path)
    barrier = threading.Barrier(2, timeout=10)

    class Together(WrappedFileSystem):
        def perform(self, number, name, real, args):
            if writes_chunk(name, args):
                barrier.wait()  # both have reserved before either publishes
            return real(*args)

    stores = [open_store(tmp_path, filesystem=Together()) for _ in range(2)]
    threads = [threading.Thread(target=s.write, args=(A, blob_of(A))) for s in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(s.counts().get("writes", 0) for s in stores) == [0, 1]
    assert one.used() == disk.bytes_on_disk(tmp_path) == disk_bytes(len(blob_of(A)))
    assert two.read(A) == blob_of(A)


def test_data_altered_between_write_and_publication_is_not_published(tmp_path: Path) -> None:
    class Altering(WrappedFileSystem):
        def perform(self, number, name, real, args):
            if writes_chunk(name, args):
                changed = bytearray(args[1])
                changed[50] ^= 1
                return real(args[0], memoryview(changed), args[2])
            return real(*args)

    store = open_store(tmp_path, filesystem=Altering())
    assert reason(store.write, A, small(A)) == "io"
    assert (store.scan(), store.used(), disk.temporaries(tmp_path)) == ([], 0, [])


def test_the_least_recently_used_chunks_of_any_namespace_go(tmp_path: Path) -> None:
    store = open_store(tmp_path, pages=3)
    other = open_store(tmp_path, OTHER_NAMESPACE, pages=3)
    store.write(A, small(A))
    other.write(A, small(A, OTHER_NAMESPACE))
    store.write(B, small(B))
    assert store.touch([B, A, C]) == [C]
    store.write(C, small(C))
    assert store.take_evicted() == []  # it was the other's
    assert reason(other.read, A) == "missing"
    store.write(D, small(D))
    assert store.take_evicted() == [B]
    assert [entry.key for entry in store.scan()] == [A, C, D]
    assert store.used() == 3 * PAGE
    assert store.counts()["evicted"] == 2


def test_what_was_used_after_the_survey_is_not_evicted(tmp_path: Path) -> None:
    store, other = open_store(tmp_path, pages=3), open_store(tmp_path, pages=3)
    for key in (A, B, C):
        store.write(key, small(key))
    store.write(D, small(D))  # surveys, and evicts A
    other.touch([B])
    store.write(A, small(A))
    assert store.take_evicted() == [A, C]


def test_room_is_made_for_large_blobs_and_refused_beyond_the_cap(tmp_path: Path) -> None:
    store = open_store(tmp_path, pages=4)
    for key in (A, B, C):
        store.write(key, small(key))
    large = sealed(D, 3 * PAGE)
    store.write(D, large)
    assert sorted(store.take_evicted()) == sorted([A, B, C])
    assert reason(store.write, A, sealed(A, 4 * PAGE)) == "full"
    assert store.read(D) == large


def sealed(key: bytes, length: int) -> bytes:
    """A blob with a body of `length` bytes."""
    content = blob_of(key)[:76] + bytes(length)
    return content + xxhash.xxh3_128_digest(content)


def test_free_space_is_kept_by_shrinking(tmp_path: Path) -> None:
    class Volume(WrappedFileSystem):
        free = 10 * PAGE

        def perform(self, number, name, real, args):
            return self.free if name == "free_bytes" else real(*args)

    volume = Volume()
    store = open_store(tmp_path, min_free=5 * PAGE, filesystem=volume)
    for key in (A, B, C):
        store.write(key, small(key))
    volume.free = 4 * PAGE  # somebody else's files
    store.write(D, small(D))
    assert store.take_evicted() == [A, B]
    volume.free = 0
    assert reason(store.write, A, small(A)) == "full"
    assert store.used() == disk.bytes_on_disk(tmp_path) == 0


def test_a_restart_keeps_recency_and_leaves_others_alone(tmp_path: Path) -> None:
    store, other = open_store(tmp_path), open_store(tmp_path, OTHER_NAMESPACE)
    for key in (A, B, C):
        store.write(key, small(key))
        other.write(key, small(key, OTHER_NAMESPACE))
    store.touch([C, A])
    store.close()
    (tmp_path / NAMESPACE.hex() / "tmp" / "123-0123456789abcdef.tmp").write_bytes(bytes(5000))
    foreign = tmp_path / OTHER_NAMESPACE.hex() / "tmp" / "123-0123456789abcdef.tmp"
    foreign.write_bytes(bytes(5000))
    (tmp_path / "notes.txt").write_text("not ours")
    (path_of(tmp_path, A).parent / "notes.txt").write_text("not ours")
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    restarted = open_store(tmp_path)
    assert [entry.key for entry in restarted.scan()] == [B, C, A]
    gone = set(before) - {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in gone} == {"123-0123456789abcdef.tmp"}
    assert foreign.exists()
    assert [e.key for e in other.scan()] == [A, B, C]
    assert not foreign.exists()
    assert restarted.used() == 6 * PAGE


def test_the_temporary_of_a_living_writer_stays_and_counts(tmp_path: Path) -> None:
    inside, go = threading.Event(), threading.Event()

    class Slow(WrappedFileSystem):
        def perform(self, number, name, real, args):
            if writes_chunk(name, args):
                inside.set()
                go.wait(10)
            return real(*args)

    slow, store = open_store(tmp_path, filesystem=Slow()), open_store(tmp_path)
    thread = threading.Thread(target=slow.write, args=(A, small(A)))
    thread.start()
    inside.wait(10)
    assert store.scan() == []
    assert (len(disk.temporaries(tmp_path)), store.used()) == (1, PAGE)
    go.set()
    thread.join(10)
    assert store.read(A) == small(A)


@pytest.mark.parametrize("content", [b"", b"garbage", b'{"x": 1}', None])
def test_a_lost_or_broken_ledger_is_counted_anew(content: bytes | None, tmp_path: Path) -> None:
    store = open_store(tmp_path, pages=3)
    open_store(tmp_path, OTHER_NAMESPACE, pages=3).write(A, small(A, OTHER_NAMESPACE))
    store.write(A, small(A))
    ledger = tmp_path / "ledger.json"
    if content is None:
        ledger.unlink()
    else:
        ledger.write_bytes(content)
    assert store.used() == 2 * PAGE
    store.write(B, small(B))
    store.write(C, small(C))
    assert disk.bytes_on_disk(tmp_path) == disk.ledger_bytes(tmp_path) == 3 * PAGE


def test_a_ledger_that_is_too_high_costs_no_chunk_for_ever(tmp_path: Path) -> None:
    store = open_store(tmp_path, pages=3)
    store.write(A, small(A))
    with Ledger(CheckedFileSystem(OsFileSystem(str(tmp_path))), str(tmp_path)).locked() as ledger:
        ledger.account(NAMESPACE.hex()).used += 50 * PAGE  # as after a kill between two steps
    store.write(B, small(B))
    assert store.take_evicted() == []
    assert store.used() == 2 * PAGE


def test_a_deleted_directory_is_made_anew(tmp_path: Path) -> None:
    root = tmp_path / "tier"
    store, other = open_store(root), open_store(root)
    store.write(A, small(A))
    shutil.rmtree(root)
    assert reason(store.read, A) == "missing"
    store.write(B, small(B))
    other.write(C, small(C))
    assert store.read(C) == small(C)
    assert store.used() == other.used() == 2 * PAGE
    shutil.rmtree(root / NAMESPACE.hex())
    store.write(A, small(A))
    assert [entry.key for entry in other.scan()] == [A]
    assert other.used() == PAGE


def test_a_newer_layout_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    for content in ('{"layout": 2}', "{}", "nonsense"):
        (tmp_path / "layout.json").write_text(content)
        assert reason(open_store, tmp_path) == "layout"
        assert os.listdir(tmp_path) == ["layout.json"]


def test_the_record_is_written_once(tmp_path: Path) -> None:
    record = NamespaceRecord(model="m", codec="kvtc", dtype="bfloat16", rank=1, tp_size=2)
    open_store(tmp_path, namespace_record=record)
    other = NamespaceRecord(model="other", codec="raw", dtype="float16", rank=0, tp_size=1)
    open_store(tmp_path, namespace_record=other)
    written = json.loads((tmp_path / NAMESPACE.hex() / "namespace.json").read_text())
    assert (written["model"], written["rank"], written["tp_size"]) == ("m", 1, 2)


def test_a_closed_store_says_so_and_keeps_no_descriptor(tmp_path: Path) -> None:
    descriptors = disk.open_descriptors()
    store = open_store(tmp_path)
    store.write(A, small(A))
    store.read(A)
    store.close()
    store.close()
    assert disk.open_descriptors() == descriptors
    assert reason(store.read, A) == reason(store.write, A, small(A)) == "closed"
    assert store.touch([A]) == []
    assert disk.ledger_accounts(tmp_path)[NAMESPACE.hex()]["hits"] == 1
    assert reason(open_store, tmp_path / "layout.json") != ""
    assert disk.open_descriptors() == descriptors


def test_one_store_in_many_threads(tmp_path: Path) -> None:
    store = open_store(tmp_path, pages=30)
    wrong: list[str] = []

    def work(seed: int) -> None:
        for n in range(60):
            key = key_of((n * 7 + seed * 13) % 40)
            try:
                if n % 3 == 0:
                    store.write(key, small(key))
                elif store.read(key) != small(key):
                    wrong.append(key.hex())
            except DiskError as error:
                if error.reason != "missing":
                    wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert wrong == []
    assert disk.ledger_bytes(tmp_path) == disk.bytes_on_disk(tmp_path) <= 30 * PAGE


def test_a_file_system_without_locks_is_refused_by_name(tmp_path: Path) -> None:
    class NoLocks(WrappedFileSystem):
        def perform(self, number, name, real, args):
            if name == "try_lock":
                raise OSError(95, "Operation not supported")
            return real(*args)

    assert reason(lambda: open_store(tmp_path, filesystem=NoLocks())) == "unsupported"


def test_arguments_that_cannot_be(tmp_path: Path) -> None:
    for namespace, capacity, free in ((b"short", 1, 0), (NAMESPACE, 0, 0), (NAMESPACE, 1, -1)):
        with pytest.raises(ValueError):
            DiskStore(tmp_path, namespace, capacity=capacity, min_free=free)


def test_cap_and_free_space_are_on_by_default(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, NAMESPACE, filesystem=OsFileSystem())
    assert 0 < store.capacity < 2**40
