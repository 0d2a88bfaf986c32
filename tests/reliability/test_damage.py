"""Damaged bookkeeping: every flipped bit of every file that a tier keeps for itself."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from kvtc_vllm.cli import main
from kvtc_vllm.tiers.disk import DiskError, DiskStore, NamespaceRecord, record
from kvtc_vllm.tiers.disk.survey import Survey
from tests.reliability import disk
from tests.reliability.blobs import NAMESPACE, OTHER_NAMESPACE, blob_of, key_of
from tests.reliability.faults import WrappedFileSystem

RECORD = NamespaceRecord(
    model="m", codec="raw", dtype="bfloat16", rank=0, tp_size=1, facts={"weights": "0123"}
)
KEYS = [key_of(number) for number in range(3)]
PAGE = 4096
FILES = ("ledger.json", "layout.json", f"{NAMESPACE.hex()}/namespace.json")
SHAPES = {
    "empty": b"",
    "one brace": b"{",
    "no UTF-8": b'{"\xff": 1}',
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "a huge number": b'{"layout": ' + b"9" * 400 + b"}",
    "negative": b'{"layout": -1}',
    "another type": b"[1, 2]",
    "null": b"null",
    "zeros": bytes(4096),
    "enlarged": b" " * (17 << 20),
}


def blob(key: bytes, namespace: bytes = NAMESPACE) -> bytes:
    return blob_of(key, namespace, longest=4000)


def open_store(root: Path, namespace: bytes = NAMESPACE, **more) -> DiskStore:
    more.setdefault("capacity", 100 * PAGE)
    return DiskStore(root, namespace, min_free=0, namespace_record=RECORD, **more)


@pytest.fixture
def tier(scratch: Path) -> Path:
    """Two namespaces, as an engine leaves them."""
    root = scratch / "tier"
    for namespace in (NAMESPACE, OTHER_NAMESPACE):
        store = open_store(root, namespace)
        store.scan()
        for key in KEYS:
            store.write(key, blob(key, namespace))
            store.read(key)
        store.close()
    return root


def flips(content: bytes) -> Iterator[bytes]:
    """Each bit of what is not padding, and one of the padding."""
    end = len(content.rstrip(b" ")) + 1
    for bit in range(8 * min(end, len(content))):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def works(root: Path) -> DiskStore:
    """The engine starts, finds all, writes; the ledger is right and within the cap."""
    store = open_store(root)
    assert {entry.key for entry in store.scan()} >= set(KEYS)
    for key in KEYS:
        assert store.read(key) == blob(key)
    new = key_of(7)
    store.write(new, blob(new))
    assert store.read(new) == blob(new)
    store.remove([new])
    assert store.errors() == {}
    assert store.used() == disk.ledger_bytes(root) == disk.bytes_on_disk(root)
    store.close()
    return store


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_flip_of_a_bookkeeping_file_is_repaired(name: str, tier: Path) -> None:
    original = (tier / name).read_bytes()
    repairs = 0
    for damaged in flips(original):
        (tier / name).write_bytes(damaged)
        repairs += works(tier).counts().get("repairs", 0)
    assert repairs > 2 * len(original.rstrip(b" "))  # a letter within a text is no damage to JSON


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FILES)
def test_a_bookkeeping_file_that_is_something_else(
    name: str, shape: str, tier: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tier / name).write_bytes(SHAPES[shape])
    with caplog.at_level(logging.WARNING, "vllm.kvtc"):
        store = works(tier)
    lines = [line for line in caplog.messages if name in line and "damaged" in line]
    new = name == "ledger.json" and shape == "empty"  # as a new one is
    assert (store.counts().get("repairs", 0), len(lines)) == ((0, 0) if new else (1, 1))
    assert (tier / name).stat().st_size < 1 << 16


@pytest.mark.parametrize("name", FILES)
def test_cuts(name: str, tier: Path) -> None:
    original = (tier / name).read_bytes().rstrip(b" ")
    for length in range(1, len(original), 7):
        (tier / name).write_bytes(original[:length])
        assert works(tier).counts()["repairs"] == 1


@pytest.mark.parametrize("name", FILES)
def test_a_running_store_and_the_commands_outlive_the_damage(
    name: str, tier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(tier)
    for shape, content in SHAPES.items():
        (tier / name).write_bytes(content)
        new = key_of(8)
        store.write(new, blob(new))
        assert store.read(new) == blob(new), shape
        store.remove([new])
        assert main(["inspect", str(tier)]) == main(["gc", str(tier)]) == 0, shape
        assert store.used() == disk.bytes_on_disk(tier), shape
    assert store.errors() == {}


@pytest.mark.parametrize(
    ("name", "account"),
    [
        (NAMESPACE.hex(), {"used": -5}),
        (NAMESPACE.hex(), {"used": 0.5}),
        (NAMESPACE.hex(), {"hits": -1}),
        (NAMESPACE.hex(), {"used": 2**64 - 1}),
        (NAMESPACE.hex(), {"next": 256}),
        ("../../etc", {"used": 5}),
    ],
)
def test_accounts_that_cannot_be(name: str, account: dict[str, float], tier: Path) -> None:
    """Also with a checksum that fits."""
    accounts = {name: account}
    seal = xxhash.xxh3_128_hexdigest(json.dumps(accounts, separators=(",", ":")).encode())
    (tier / "ledger.json").write_text(json.dumps({"checksum": seal, "accounts": accounts}))
    assert works(tier).counts()["repairs"] == 1


def test_a_newer_layout_is_no_damage(tier: Path) -> None:
    newer = json.dumps({"layout": 2, "checksum": record._seal(2)})
    (tier / "layout.json").write_text(newer)
    with pytest.raises(DiskError, match="layout 2, this build 1"):
        open_store(tier)
    with pytest.raises(DiskError, match="layout 2"):
        Survey(tier)
    assert (tier / "layout.json").read_text() == newer


def test_a_layout_as_it_was_before_checksums_is_read(tier: Path) -> None:
    (tier / "layout.json").write_text('{"layout":1}')
    assert works(tier).counts().get("repairs", 0) == 0


def test_processes_that_find_the_ledger_lost_together(tier: Path) -> None:
    """One is killed in the middle of its count; the others finish it."""
    stores = [open_store(tier) for _ in range(2)]
    (tier / "ledger.json").write_bytes(b"lost")
    dying = open_store(tier, filesystem=DyingFileSystem())
    with pytest.raises(KeyboardInterrupt):
        dying.write(key_of(9), blob(key_of(9)))
    for number, store in enumerate(stores):
        store.write(key_of(20 + number), blob(key_of(20 + number)))
        assert store.used() == disk.bytes_on_disk(tier)


class DyingFileSystem(WrappedFileSystem):
    """Ends in the middle of the second namespace."""

    def perform(self, number, name, real, args):
        if name == "list" and args[0].endswith(OTHER_NAMESPACE.hex()):
            raise KeyboardInterrupt
        return real(*args)


def test_nothing_stays_set_aside_but_what_was_in_the_way(tier: Path) -> None:
    for name in ("ledger.json", f"{NAMESPACE.hex()}/namespace.json", f"{NAMESPACE.hex()}/tmp"):
        path = tier / name
        if path.is_dir():
            shutil.rmtree(path)
            path.write_bytes(b"a file where a directory belongs")
        else:
            path.unlink()
            path.mkdir()
            (path / "somebody's").write_bytes(b"kept")
    works(tier)
    aside = sorted(tier.glob("set-aside-*"))
    assert len(aside) == 3
    assert sum(path.is_dir() and (path / "somebody's").exists() for path in aside) == 2
