"""Namespaces of engines that may have ended: the mark of use, dropping, and `kvtc gc --ended`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from kvtc_vllm.cli import main
from kvtc_vllm.tiers.disk import DiskError, DiskStore, NamespaceRecord, in_use, space
from kvtc_vllm.tiers.disk.record import MAX_RECORD_BYTES
from kvtc_vllm.tiers.disk.survey import Survey
from tests.reliability import disk
from tests.reliability.blobs import NAMESPACE, OTHER_NAMESPACE, blob_of, key_of
from tests.reliability.faults import WrappedFileSystem

ROOT = Path(__file__).parents[3]
NAME, OTHER_NAME = NAMESPACE.hex(), OTHER_NAMESPACE.hex()
RECORD = NamespaceRecord(model="my-model", codec="raw", dtype="bfloat16", rank=0, tp_size=1)
GENERATION = msgspec.structs.replace(
    RECORD, generation="c0ffee", facts={"weights": "699b1cb8", "cache dtype": "fp8"}
)


def open_store(
    root: Path,
    namespace: bytes = NAMESPACE,
    record: NamespaceRecord = GENERATION,
    filesystem: WrappedFileSystem | None = None,
) -> DiskStore:
    return DiskStore(
        root,
        namespace,
        capacity=2**30,
        min_free=0,
        namespace_record=record,
        filesystem=filesystem,
    )


def fill(store: DiskStore, chunks: int = 3) -> None:
    for number in range(chunks):
        store.write(key_of(number), blob_of(key_of(number), store.namespace, longest=2000))


def leave_behind(root: Path, namespace: bytes, record: NamespaceRecord) -> None:
    """What an engine that ended leaves."""
    store = open_store(root, namespace, record)
    fill(store)
    store.close()


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_a_namespace_is_in_use_until_the_last_store_is_closed(tmp_path: Path) -> None:
    descriptors = disk.open_descriptors()
    stores = [open_store(tmp_path), open_store(tmp_path)]
    survey = Survey(tmp_path)
    assert survey.in_use(NAME)
    stores[0].close()
    assert survey.in_use(NAME)
    stores[1].close()
    assert not survey.in_use(NAME)
    assert not survey.in_use(OTHER_NAME)
    assert disk.open_descriptors() == descriptors


def test_a_killed_process_uses_nothing_any_more(tmp_path: Path) -> None:
    code = (
        "import sys, time; from kvtc_vllm.tiers.disk import DiskStore; "
        "store = DiskStore(sys.argv[1], bytes.fromhex(sys.argv[2])); "
        "print('open', flush=True); time.sleep(100)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), NAME], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        assert Survey(tmp_path).in_use(NAME)
    finally:
        child.kill()
        child.communicate()
    assert not Survey(tmp_path).in_use(NAME)


class NoMark(WrappedFileSystem):
    """Every call for the mark fails."""

    def perform(self, number: int, name: str, real: Callable[..., Any], args: tuple) -> Any:
        if name == "try_lock_shared":
            raise OSError(95, "Operation not supported")
        return real(*args)


def test_a_store_that_cannot_mark_its_namespace_works(tmp_path: Path) -> None:
    descriptors = disk.open_descriptors()
    store = open_store(tmp_path, filesystem=NoMark())
    fill(store)
    assert len(store.scan()) == 3
    assert not Survey(tmp_path).in_use(NAME)
    store.close()
    assert disk.open_descriptors() == descriptors


def test_a_mark_is_set_although_somebody_is_just_looking(tmp_path: Path) -> None:
    class Looking(WrappedFileSystem):
        refused = 0

        def perform(self, number: int, name: str, real: Callable[..., Any], args: tuple) -> Any:
            if name == "try_lock_shared" and self.refused < 3:
                self.refused += 1
                return False
            return real(*args)

    store = open_store(tmp_path, filesystem=Looking())
    assert Survey(tmp_path).in_use(NAME)
    store.close()


def test_what_cannot_be_told_counts_as_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_behind(tmp_path, NAMESPACE, GENERATION)
    survey = Survey(tmp_path)
    assert [found.name for found in survey.ended()] == [NAME]

    def refuse(*_: object) -> bool:
        raise DiskError("io", "the disk fails")

    monkeypatch.setattr(survey._fs, "try_lock", refuse)
    assert in_use.is_in_use(survey._fs, f"{tmp_path}/{NAME}")


@pytest.mark.parametrize("deleted", ["", NAME])
def test_a_deleted_directory_is_marked_and_described_anew(deleted: str, tmp_path: Path) -> None:
    root = tmp_path / "tier"
    store = open_store(root)
    descriptors = disk.open_descriptors()
    for _ in range(3):
        fill(store)
        shutil.rmtree(root / deleted)
    fill(store)
    assert disk.open_descriptors() == descriptors
    found = next(Survey(root).summaries())
    assert (found.in_use, found.record, found.chunks) == (True, GENERATION, 3)
    store.close()
    assert not Survey(root).in_use(NAME)


def test_a_closed_mark_is_not_set_again(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.close()
    descriptors = disk.open_descriptors()
    store._mark.set()  # as a writer would that finds the directory deleted just then
    assert disk.open_descriptors() == descriptors
    assert not Survey(tmp_path).in_use(NAME)


def test_drop_takes_its_own_namespace_and_nothing_else(tmp_path: Path) -> None:
    leave_behind(tmp_path, OTHER_NAMESPACE, RECORD)
    (tmp_path / "notes.txt").write_text("not ours")
    others = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    store = open_store(tmp_path)
    fill(store)
    store.read(key_of(0))
    (tmp_path / NAME / "tmp" / "1-0123456789abcdef.tmp").write_bytes(b"of a dead writer")
    assert store.drop() == 3
    assert not (tmp_path / NAME).exists()
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == others
    store.close()
    assert not (tmp_path / NAME).exists()
    assert list(disk.ledger_accounts(tmp_path)) == [OTHER_NAME]
    assert store.counts()["removed"] == 3
    with pytest.raises(DiskError, match="closed"):
        store.drop()


def test_drop_leaves_foreign_files_and_no_record_beside_them(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, 1)
    kept = disk.chunk_files(tmp_path)[0].with_name("notes.txt")
    kept.write_text("not ours")
    assert store.drop() == 1
    store.close()
    assert [path for path in (tmp_path / NAME).rglob("*") if path.is_file()] == [kept]
    assert disk.ledger_bytes(tmp_path) == 0
    assert list(Survey(tmp_path).ended()) == []


def test_after_drop_a_write_makes_the_namespace_anew(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store)
    store.drop()
    fill(store, 1)
    found = next(Survey(tmp_path).summaries())
    assert (found.chunks, found.in_use, found.record) == (1, True, GENERATION)
    store.close()


def test_drop_holds_the_lock_for_a_few_removals_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "REMOVED_AT_ONCE", 2)
    filesystem = WrappedFileSystem()
    store = open_store(tmp_path, filesystem=filesystem)
    fill(store, 5)
    filesystem.calls.clear()
    assert store.drop() == 5
    holds = " ".join(filesystem.calls).split("try_lock")
    chunks = [hold.count("unlink") for hold in holds if "unlink" in hold]
    assert chunks == [2, 2, 1, 6]  # at last the lists, the logs, the mark and the record
    store.close()


def test_gc_lists_exactly_the_ended_generations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_behind(tmp_path, NAMESPACE, GENERATION)
    leave_behind(tmp_path, OTHER_NAMESPACE, RECORD)  # any engine may name it again
    leave_behind(tmp_path, bytes(16), GENERATION)
    hours_ago = time.time() - 3.2 * 3600
    for path in (tmp_path / NAME).glob("??/*.kvtc"):
        os.utime(path, (hours_ago, hours_ago))
    living = open_store(tmp_path, bytes(16))
    lines = printed(capsys, "gc", str(tmp_path)).splitlines()
    assert len(lines) == 2
    assert lines[0] == (
        f"ended generation {NAME}: 3 chunks, 12288 bytes, last used 3.2h ago, model my-model"
    )
    assert re.search(r"kvtc gc .* --ended` removes them", lines[1])
    living.close()
    assert printed(capsys, "gc", str(tmp_path)).count("ended generation") == 2
    assert len(disk.chunk_files(tmp_path)) == 9


def test_gc_ended_removes_exactly_the_ended_generations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        leave_behind(tmp_path, bytes([number]) * 16, GENERATION)
    leave_behind(tmp_path, NAMESPACE, RECORD)
    living = open_store(tmp_path, bytes([2]) * 16)
    assert printed(capsys, "gc", str(tmp_path), "--ended", "--dry-run").count("would be") == 2
    assert len(disk.chunk_files(tmp_path)) == 12
    assert printed(capsys, "gc", str(tmp_path), "--ended").count("removed") == 2
    assert Survey(tmp_path).namespaces() == [NAME, "02" * 16]
    assert len(living.scan()) == 3
    assert printed(capsys, "gc", str(tmp_path), "--ended") == ""
    assert disk.ledger_bytes(tmp_path) == disk.bytes_on_disk(tmp_path)
    living.close()


def test_a_generation_without_chunks_is_as_old_as_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    created = int(time.time()) - 5 * 86400
    open_store(tmp_path, record=msgspec.structs.replace(GENERATION, created=created)).close()
    open_store(tmp_path, OTHER_NAMESPACE).close()
    listed = printed(capsys, "gc", str(tmp_path))
    assert "0 chunks, 0 bytes, last used 5d ago" in listed
    assert "0 chunks, 0 bytes, never used" in listed


def test_inspect_tells_generation_use_and_facts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_behind(tmp_path, NAMESPACE, GENERATION)
    living = open_store(tmp_path, OTHER_NAMESPACE, RECORD)
    first, second = json.loads(printed(capsys, "inspect", str(tmp_path), "--json"))["namespaces"]
    assert (first["generation"], first["in_use"]) == ("c0ffee", False)
    assert first["facts"] == GENERATION.facts
    assert (second["generation"], second["in_use"], second["facts"]) == ("", True, {})
    text = printed(capsys, "inspect", str(tmp_path))
    assert yaml.safe_load(text)["namespaces"] == [first, second]
    living.close()


def test_a_record_of_an_older_build_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_behind(tmp_path, NAMESPACE, RECORD)
    path = tmp_path / NAME / "namespace.json"
    old = json.loads(path.read_text())
    del old["generation"], old["facts"]
    path.write_text(json.dumps(old))
    assert next(Survey(tmp_path).summaries()).record == RECORD
    assert printed(capsys, "gc", str(tmp_path)) == ""


def test_facts_that_are_too_many_are_left_out_of_the_record(tmp_path: Path) -> None:
    facts = {"fact": "x" * MAX_RECORD_BYTES}
    open_store(tmp_path, record=msgspec.structs.replace(GENERATION, facts=facts)).close()
    assert next(Survey(tmp_path).summaries()).record == msgspec.structs.replace(
        GENERATION, facts={}
    )
