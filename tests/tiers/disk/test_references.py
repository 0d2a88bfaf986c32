"""Chunks with a body that another chunk of the tenant has: kept once, and never read wrong."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash

from kvtc_vllm.tiers.disk import DiskError, DiskStore, NamespaceRecord
from kvtc_vllm.tiers.disk.bodies import Bodies, Representative
from kvtc_vllm.tiers.disk.reference import REFERENCE_BYTES, link_path
from kvtc_vllm.tiers.disk.survey import Survey
from kvtc_vllm.tiers.keys import RecordKey
from tests.reliability import disk
from tests.reliability.blobs import NAMESPACE, OTHER_NAMESPACE, blob_of, key_of, twin_of
from tests.reliability.faults import WrappedFileSystem

PAGE = 4096
TENANT = b"one"
KEYS = [RecordKey(key_of(number)) for number in range(4)]
FIRST, SECOND, THIRD, FOURTH = KEYS


def twin(key: bytes, namespace: bytes = NAMESPACE) -> bytes:
    """All have one body, of five blocks."""
    return twin_of(key, namespace, bodies=1)


WHOLE = -(-len(twin(FIRST)) // PAGE) * PAGE


def opened(root: Path, namespace: bytes = NAMESPACE, pages: int = 100, **more) -> DiskStore:
    return DiskStore(root, namespace, capacity=pages * PAGE, min_free=0, **more)


def filled(root: Path, *keys: bytes, **more) -> DiskStore:
    """With twins of one tenant."""
    store = opened(root, **more)
    store.scan()
    for key in keys:
        store.write(key, twin(key), TENANT)
    return store


def path_of(root: Path, key: bytes) -> Path:
    return root / NAMESPACE.hex() / key.hex()[:2] / f"{key.hex()}.kvtc"


def link_of(root: Path, key: bytes, of: bytes = FIRST) -> Path:
    return Path(link_path(f"{root}/{NAMESPACE.hex()}", RecordKey(of), RecordKey(key)))


def sizes(root: Path) -> list[int]:
    """Of files that are a chunk's own."""
    return sorted(path.stat().st_size for path in disk.chunk_files(root))


def check_bytes(root: Path) -> int:
    """What the ledger says is what is there."""
    assert disk.ledger_bytes(root) == disk.bytes_on_disk(root)
    return disk.bytes_on_disk(root)


def test_an_equal_body_takes_one_block(scratch: Path) -> None:
    store = opened(scratch)
    assert store.write(FIRST, twin(FIRST), TENANT) == WHOLE
    assert store.write(SECOND, twin(SECOND), TENANT) == PAGE
    assert store.write(THIRD, twin(THIRD), TENANT) == PAGE
    assert sizes(scratch) == [REFERENCE_BYTES, REFERENCE_BYTES, len(twin(FIRST))]
    assert [store.read(key) for key in KEYS[:3]] == [twin(key) for key in KEYS[:3]]
    assert check_bytes(scratch) == store.used() == WHOLE + 2 * PAGE
    assert store.write(SECOND, twin(SECOND), TENANT) == PAGE  # it is there
    assert store.write(SECOND, twin(SECOND)) == PAGE
    assert store.counts()["writes_present"] == 2
    assert store.errors() == {}


@pytest.mark.parametrize("tenant", [b"another", b""])
def test_tenants_share_nothing(tenant: bytes, scratch: Path) -> None:
    store = filled(scratch, FIRST)
    assert store.write(SECOND, twin(SECOND), tenant) == WHOLE
    assert disk.links(scratch) == []


def test_nobodys_chunks_are_referred_to_by_nobody(scratch: Path) -> None:
    store = opened(scratch)
    assert [store.write(key, twin(key)) for key in (FIRST, SECOND)] == [WHOLE, WHOLE]
    assert store.write(THIRD, twin(THIRD), TENANT) == WHOLE


def test_namespaces_share_nothing(scratch: Path) -> None:
    filled(scratch, FIRST)
    other = opened(scratch, OTHER_NAMESPACE)
    assert other.write(SECOND, twin(SECOND, OTHER_NAMESPACE), TENANT) == WHOLE


def test_another_body_of_the_same_hash_is_kept_apart(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtc_vllm.tiers.disk.bodies.body_name", lambda owner, body: owner)
    store = filled(scratch, FIRST)
    other = twin(SECOND)[:76] + bytes(len(twin(SECOND)) - 92)
    other += xxhash.xxh3_128_digest(other)
    assert store.write(SECOND, other, TENANT) == WHOLE
    assert store.read(SECOND) == other


def test_small_blobs_are_kept_whole(scratch: Path) -> None:
    store = opened(scratch)
    for key in (FIRST, SECOND):
        assert store.write(key, twin_of(key, longest=3000, bodies=1), TENANT) == PAGE
    assert disk.links(scratch) == []


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_a_representative_stays_until_the_last_reference_goes(
    order: tuple[int, ...], scratch: Path
) -> None:
    store = filled(scratch, FIRST, SECOND, THIRD)
    left = [FIRST, SECOND, THIRD]
    for number in order:
        assert store.remove([KEYS[number]]) == 1
        left.remove(KEYS[number])
        assert [store.read(key) for key in left] == [twin(key) for key in left]
        kept = WHOLE if left else 0
        assert check_bytes(scratch) == kept + PAGE * len([key for key in left if key != FIRST])
        assert {entry.key for entry in store.scan()} == set(left)
        check_bytes(scratch)
        with pytest.raises(DiskError, match="missing"):
            store.read(KEYS[number])
    assert disk.links(scratch) == []


def test_a_reference_is_not_referred_to(scratch: Path) -> None:
    store = filled(scratch, FIRST, SECOND)
    store.remove([FIRST])
    assert store.write(THIRD, twin(THIRD), TENANT) == WHOLE  # what has a name only as a link
    assert store.write(FOURTH, twin(FOURTH), TENANT) == PAGE
    assert disk.links(scratch) == sorted(
        (link_of(scratch, SECOND), link_of(scratch, FOURTH, THIRD))
    )
    assert store.write(FIRST, twin(FIRST), TENANT) == PAGE
    store.remove([THIRD, FOURTH])
    assert [store.read(key) for key in (FIRST, SECOND)] == [twin(FIRST), twin(SECOND)]
    check_bytes(scratch)
    store.remove([FIRST, SECOND])
    assert check_bytes(scratch) == 0


def test_a_representative_that_is_stored_again_is_another_file(scratch: Path) -> None:
    store = filled(scratch, FIRST, SECOND)
    store.remove([FIRST])
    assert store.write(FIRST, twin(FIRST), TENANT) == WHOLE
    assert check_bytes(scratch) == 2 * WHOLE + PAGE
    assert store.write(THIRD, twin(THIRD), TENANT) == PAGE
    store.scan()
    assert check_bytes(scratch) == 2 * WHOLE + 2 * PAGE
    store.remove([SECOND])
    assert check_bytes(scratch) == WHOLE + PAGE
    assert store.read(THIRD) == twin(THIRD)


def test_evicting_a_representative_loses_nothing_else(scratch: Path) -> None:
    pages = WHOLE // PAGE
    store = filled(scratch, FIRST, SECOND, pages=pages + 3)
    for number in range(10, 13):
        store.write(key_of(number), twin_of(key_of(number), longest=3000, bodies=9))
    # The first one's name went, for which there was nothing, and the reference after it.
    assert store.take_evicted() == [FIRST, SECOND]
    assert disk.links(scratch) == []
    assert check_bytes(scratch) == 3 * PAGE


def test_making_room_for_a_reference_spares_what_it_refers_to(scratch: Path) -> None:
    store = opened(scratch, pages=WHOLE // PAGE + 1)
    store.write(FIRST, twin(FIRST), TENANT)
    store.write(THIRD, blob_of(THIRD, longest=3000))
    assert store.write(SECOND, twin(SECOND), TENANT) == PAGE
    assert store.take_evicted() == [THIRD]


def test_a_reference_in_use_outlives_its_representative(scratch: Path) -> None:
    pages = WHOLE // PAGE
    store = filled(scratch, FIRST, SECOND, pages=pages + 3)
    for number in range(10, 20):
        store.write(key_of(number), twin_of(key_of(number), longest=3000, bodies=9))
        store.touch([SECOND])
        assert store.read(SECOND) == twin(SECOND)
        assert check_bytes(scratch) <= (pages + 3) * PAGE
    assert FIRST in store.take_evicted()


@pytest.mark.parametrize(
    "damage", ["gone", "flip", "cut", "pipe", "symlink", "another", "directory"]
)
def test_what_it_refers_to_is_gone_or_altered(damage: str, scratch: Path) -> None:
    store = filled(scratch, FIRST, SECOND)
    link = link_of(scratch, SECOND)
    content = bytearray(link.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        link.write_bytes(content)
    elif damage == "cut":
        link.write_bytes(content[:-1])
    else:
        link.unlink()
    if damage == "pipe":
        os.mkfifo(link)
    elif damage == "symlink":
        link.symlink_to(path_of(scratch, FIRST))
    elif damage == "directory":
        link.mkdir()
    elif damage == "another":
        link.write_bytes(blob_of(FIRST))
    with pytest.raises(DiskError, match="representative"):
        store.read(SECOND)
    assert store.errors()["read", "representative"] == 1
    assert not path_of(scratch, SECOND).exists()
    if damage not in ("cut", "another"):  # what changes a file's length is counted by a scan
        check_bytes(scratch)
    if damage in ("flip", "cut"):  # one file with two names
        with pytest.raises(DiskError, match="corrupt"):
            store.read(FIRST)
    else:
        assert store.read(FIRST) == twin(FIRST)
    assert store.write(SECOND, twin(SECOND), TENANT) in (PAGE, WHOLE)
    assert store.read(SECOND) == twin(SECOND)


@pytest.mark.parametrize("at", [0, 9, 12, 40, 95, 120, REFERENCE_BYTES - 1])
def test_a_damaged_reference_is_a_miss_and_goes(at: int, scratch: Path) -> None:
    store = filled(scratch, FIRST, SECOND)
    content = bytearray(path_of(scratch, SECOND).read_bytes())
    content[at] ^= 1
    path_of(scratch, SECOND).write_bytes(content)
    with pytest.raises(DiskError, match="corrupt"):
        store.read(SECOND)
    assert not path_of(scratch, SECOND).exists()
    store.scan()
    assert check_bytes(scratch) == WHOLE
    store.remove([FIRST])
    store.scan()
    assert disk.links(scratch) == []
    assert check_bytes(scratch) == 0


def test_a_reference_under_another_key_is_a_miss(scratch: Path) -> None:
    store = filled(scratch, FIRST, SECOND)
    path_of(scratch, THIRD).parent.mkdir(exist_ok=True)
    path_of(scratch, THIRD).write_bytes(path_of(scratch, SECOND).read_bytes())
    os.link(path_of(scratch, FIRST), link_of(scratch, THIRD))
    with pytest.raises(DiskError, match="representative"):
        store.read(THIRD)
    assert store.read(SECOND) == twin(SECOND)


def test_a_restart_and_another_process_read_references(scratch: Path) -> None:
    first = filled(scratch, FIRST, SECOND)
    second = opened(scratch)
    assert {entry.key: entry.size for entry in second.scan()} == {FIRST: WHOLE, SECOND: PAGE}
    assert second.read(SECOND) == twin(SECOND)
    second.remove([FIRST])
    assert first.take_removed() == [FIRST]
    assert first.read(SECOND) == twin(SECOND)
    # Who has not written it does not know it, and learns it by writing.
    assert second.write(THIRD, twin(THIRD), TENANT) == WHOLE
    assert second.write(FOURTH, twin(FOURTH), TENANT) == PAGE


def test_a_link_that_nobody_reads_goes_with_a_scan(scratch: Path) -> None:
    store = filled(scratch, FIRST, SECOND)
    path_of(scratch, SECOND).unlink()
    store.remove([FIRST])
    assert disk.ledger_bytes(scratch) == WHOLE + PAGE  # never below the truth
    store.scan()
    assert disk.links(scratch) == []
    assert check_bytes(scratch) == 0


def test_a_link_that_is_left_over_is_in_nobodys_way(scratch: Path) -> None:
    store = filled(scratch, FIRST, SECOND)
    path_of(scratch, SECOND).unlink()
    assert store.write(SECOND, twin(SECOND), TENANT) == PAGE
    assert store.read(SECOND) == twin(SECOND)


def test_what_is_replaced_after_it_was_compared_is_not_referred_to(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(scratch, FIRST)
    found = Bodies.find

    def find(self: Bodies, *arguments: Any) -> Representative | None:
        of = found(self, *arguments)
        copy = scratch / "copy"
        copy.write_bytes(path_of(scratch, FIRST).read_bytes())
        copy.rename(path_of(scratch, FIRST))
        return of

    monkeypatch.setattr(Bodies, "find", find)
    assert store.write(SECOND, twin(SECOND), TENANT) == WHOLE
    assert store.errors() == {("refer", "representative"): 1}
    assert disk.links(scratch) == []
    assert disk.temporaries(scratch) == []
    check_bytes(scratch)


class NoLinks(WrappedFileSystem):
    """As some network file systems."""

    def perform(self, number, name, real, args):
        if name == "link":
            raise OSError(errno.EPERM, "no links")
        return real(*args)


def test_without_hard_links_chunks_are_whole(scratch: Path) -> None:
    store = filled(scratch, FIRST, SECOND, filesystem=NoLinks())
    assert [store.read(key) for key in (FIRST, SECOND)] == [twin(FIRST), twin(SECOND)]
    assert check_bytes(scratch) == 2 * WHOLE
    assert store.errors() == {("refer", "permission"): 1}


def test_copies_by_hard_links_free_what_they_would_without(scratch: Path) -> None:
    """Some programs that make backups do that."""
    store = filled(scratch / "tier", FIRST, SECOND, THIRD)
    for path in (*disk.chunk_files(scratch / "tier"), *disk.links(scratch / "tier")):
        os.link(path, scratch / path.name)
    store.remove([FIRST, SECOND, THIRD])
    store.scan()
    assert check_bytes(scratch / "tier") == 0


def test_a_whole_chunk_takes_the_place_of_a_reference(scratch: Path) -> None:
    """As of a chunk that was halved."""
    store = filled(scratch, FIRST, SECOND)
    smaller = blob_of(SECOND, longest=6000)
    store.write(SECOND, smaller)
    assert store.read(SECOND) == smaller
    assert disk.links(scratch) == []
    check_bytes(scratch)


def test_tiers_without_references_pay_nothing(scratch: Path) -> None:
    """No call but those that there were: opening, scanning, writing, reading, removing."""
    plain, with_tenant = WrappedFileSystem(), WrappedFileSystem()
    for root, filesystem, tenant in (
        (scratch / "plain", plain, b""),
        (scratch / "tenant", with_tenant, TENANT),
    ):
        store = opened(root, filesystem=filesystem)
        for number in range(6):
            store.write(key_of(number), blob_of(key_of(number)), tenant)
            store.read(key_of(number))
        store.touch([FIRST])
        store.remove([SECOND])
        store.scan()
        store.close()
    assert plain.calls == with_tenant.calls
    assert "link" not in plain.calls


def test_the_commands_know_references(scratch: Path) -> None:
    record = NamespaceRecord(model="m", codec="raw", dtype="bfloat16", rank=0, tp_size=1)
    store = filled(scratch, FIRST, SECOND, THIRD, namespace_record=record)
    store.remove([FIRST])
    survey = Survey(scratch)
    (summary,) = survey.summaries()
    assert (summary.chunks, summary.references) == (2, 2)
    assert summary.used == WHOLE + 2 * PAGE == check_bytes(scratch)
    assert survey.read(summary.name, SECOND) == twin(SECOND)
    link_of(scratch, SECOND).unlink()
    with pytest.raises(DiskError, match="representative"):
        survey.read(summary.name, SECOND)
    assert survey.shrink(0) == (2, 2 * PAGE + WHOLE, 0)
    assert check_bytes(scratch) == 0


def test_a_dropped_namespace_leaves_no_links(scratch: Path) -> None:
    store = filled(scratch, FIRST, SECOND)
    assert store.drop() == 2
    assert not (scratch / NAMESPACE.hex()).exists()
    assert check_bytes(scratch) == 0
