"""`kvtc verify`, `kvtc gc` and `kvtc inspect` on a disk tier."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import msgspec
import pytest
import torch

from kvtc_vllm.cli import main
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.tiers.disk import DiskStore, NamespaceRecord
from tests.codec.synthetic import SyntheticModel
from tests.reliability import disk
from tests.reliability.blobs import NAMESPACE, OTHER_NAMESPACE, key_of

MODEL = SyntheticModel(
    num_layers=2, num_kv_heads=1, head_size=16, layer_groups=((0, 2),), max_positions=64
)
NAMESPACES = (NAMESPACE, OTHER_NAMESPACE)
RECORD = NamespaceRecord(
    model="my-model", codec="raw", dtype="bfloat16", rank=0, tp_size=2, created=1_700_000_000
)


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    """Two namespaces with three chunks each, the last written first by half an hour."""
    root = tmp_path / "tier"
    for namespace in NAMESPACES:
        store = DiskStore(root, namespace, min_free=0, namespace_record=RECORD)
        codec = RawCodec(MODEL.geometry, torch.bfloat16, namespace)
        for number in range(3):
            key = key_of(number)
            store.write(key, codec.encode(*MODEL.chunk(8), 0, key))
        store.read(key_of(0))
        store.close()
        aged = time.time() - 1800
        os.utime(path_of(root, 2, namespace), (aged, aged))
    return root


def path_of(root: Path, number: int, namespace: bytes = NAMESPACE) -> Path:
    key = key_of(number).hex()
    return root / namespace.hex() / key[:2] / f"{key}.kvtc"


def test_inspect_tells_what_is_there(tier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tier), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["chunks"], described["disk_bytes"]) == (6, disk.bytes_on_disk(tier))
    first, second = described["namespaces"]
    assert (first["namespace"], second["namespace"]) == tuple(n.hex() for n in NAMESPACES)
    assert (first["model"], first["rank"], first["hits"]) == ("my-model", "0 of 2", 1)
    stored = sum(path.stat().st_size for path in disk.chunk_files(tier))
    raw = 6 * 8 * 2 * 2 * 16 * 2  # chunks, tokens, layers, K and V, head size, bytes
    assert first["ratio"] == round(raw / stored, 2)
    assert first["least_recent_use"] < first["most_recent_use"]
    assert main(["inspect", str(tier)]) == 0
    assert "my-model" in capsys.readouterr().out


def test_inspect_says_unknown_without_a_record(
    tier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tier / NAMESPACE.hex() / "namespace.json").write_text("{")
    assert main(["inspect", str(tier), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["namespaces"]
    assert (first["model"], second["model"]) == ("unknown", "my-model")


def test_verify_finds_and_deletes_exactly_the_bad(
    tier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tier)]) == 0
    assert capsys.readouterr().out.count("3 chunks, 0 bad") == 2
    damaged = bytearray(path_of(tier, 0).read_bytes())
    damaged[90] ^= 1
    path_of(tier, 0).write_bytes(damaged)
    foreign = path_of(tier, 1, OTHER_NAMESPACE).read_bytes()
    path_of(tier, 1).write_bytes(foreign)
    assert main(["verify", str(tier)]) == 1
    printed = capsys.readouterr().out
    assert (printed.count("checksum") + printed.count("corrupt"), printed.count("foreign")) == (
        1,
        1,
    )
    assert len(disk.chunk_files(tier)) == 6
    assert main(["verify", str(tier), "--delete"]) == 1
    assert "2 bad, 2 removed" in capsys.readouterr().out
    assert (path_of(tier, 0).exists(), path_of(tier, 1).exists()) == (False, False)
    assert main(["verify", str(tier)]) == 0
    assert disk.ledger_bytes(tier) == disk.bytes_on_disk(tier)


def test_a_reference_is_bad_if_what_it_refers_to_is(
    tier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codec = RawCodec(MODEL.geometry, torch.bfloat16, NAMESPACE)
    rows = MODEL.chunk(64)  # of more than a block
    store = DiskStore(tier, NAMESPACE, min_free=0)
    for number in (10, 11, 12):
        store.write(key_of(number), codec.encode(*rows, 0, key_of(number)), b"tenant")
    store.remove([key_of(10)])
    store.close()
    assert main(["inspect", str(tier), "--json"]) == 0
    first, _ = json.loads(capsys.readouterr().out)["namespaces"]
    assert (first["chunks"], first["references"]) == (5, 2)
    assert main(["verify", str(tier)]) == 0
    link, other = disk.links(tier)
    content = bytearray(link.read_bytes())
    content[-100] ^= 1
    capsys.readouterr()
    link.write_bytes(content)  # which is the other's too
    assert link.stat().st_ino == other.stat().st_ino
    assert main(["verify", str(tier), "--delete"]) == 1
    printed = capsys.readouterr().out
    assert (printed.count("representative"), "2 bad, 2 removed" in printed) == (2, True)
    assert disk.links(tier) == []
    assert disk.ledger_bytes(tier) == disk.bytes_on_disk(tier)
    assert main(["verify", str(tier)]) == 0


def test_gc_by_capacity_takes_the_least_recently_used(
    tier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = disk.bytes_on_disk(tier) // 6
    assert main(["gc", str(tier), "--capacity", str(4 * size), "--dry-run"]) == 0
    assert f"{2 * size} bytes over" in capsys.readouterr().out
    assert len(disk.chunk_files(tier)) == 6
    assert main(["gc", str(tier), "--capacity", str(4 * size)]) == 0
    assert "2 chunks" in capsys.readouterr().out
    left = disk.chunk_files(tier)
    assert len(left) == 4
    assert not any(path.name == path_of(tier, 2).name for path in left)


def test_gc_by_age(tier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc", str(tier), "--unused-for", "1h"]) == 0
    assert len(disk.chunk_files(tier)) == 6
    assert main(["gc", str(tier), "--unused-for", "20m", "--dry-run"]) == 0
    assert len(disk.chunk_files(tier)) == 6
    assert main(["gc", str(tier), "--unused-for", "20m"]) == 0
    assert len(disk.chunk_files(tier)) == 4
    assert disk.ledger_bytes(tier) == disk.bytes_on_disk(tier)


def test_gc_by_namespace(tier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    orphan = tier / OTHER_NAMESPACE.hex() / "tmp" / "1-0123456789abcdef.tmp"
    orphan.write_bytes(b"x")
    assert main(["gc", str(tier), "--keep", "ffff"]) == 2
    assert "nothing was removed" in capsys.readouterr().err
    assert main(["gc", str(tier), "--keep", NAMESPACE.hex()[:6], "--dry-run"]) == 0
    assert "3 chunks would be removed" in capsys.readouterr().out
    assert main(["gc", str(tier), "--keep", NAMESPACE.hex()[:6]]) == 0
    assert len(disk.chunk_files(tier)) == 3
    assert sorted(path.name for path in tier.iterdir()) == [
        NAMESPACE.hex(),
        "layout.json",
        "ledger.json",
    ]
    assert list(disk.ledger_accounts(tier)) == [NAMESPACE.hex()]


def test_what_is_no_tier_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verify", "gc"):
        assert main([command, str(tmp_path)]) == 2
        assert "not a disk tier" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_gc_refuses_what_it_cannot_read(tier: Path) -> None:
    assert main(["gc", str(tier), "--unused-for", "soon"]) == 2
    assert main(["gc", str(tier), "--capacity", "plenty"]) == 2
    assert len(disk.chunk_files(tier)) == 6


def test_a_record_s_text_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\x1b[2J\x1b]0;owned\x07m\nnamespace: forged\u202e"
    record = msgspec.structs.replace(RECORD, model=text, generation="c0ffee", facts={text: text})
    DiskStore(tmp_path, NAMESPACE, min_free=0, namespace_record=record).close()
    for command in ("inspect", "gc", "verify"):
        assert main([command, str(tmp_path)]) == 0
    printed = capsys.readouterr()
    lines = (printed.out + printed.err).split("\n")
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith("namespace: ") for line in lines)
    assert "owned" in printed.out
