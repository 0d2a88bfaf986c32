"""LMCache's own storage manager with KVTC below it, on the plain plugin route, without vLLM."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lmcache", reason="LMCache is tested by `make test-lmcache`")

from lmcache.v1.distributed.api import (
    GroupedObjectKeys,
    MemoryLayoutDesc,
    PrefetchLockMode,
    PrefetchTaskSpec,
)
from lmcache.v1.distributed.config import add_storage_manager_args, parse_args_to_config
from lmcache.v1.distributed.storage_manager import StorageManager

from kvtc_vllm.lmcache.command import adapter_spec
from kvtc_vllm.lmcache.settings import load_settings
from kvtc_vllm.lmcache.transcoder import transcoder
from tests.lmcache.chunks import SETTINGS, chunk, error
from tests.lmcache.paired import paired_artifact
from tests.lmcache.storage import key

LAYOUT = MemoryLayoutDesc([chunk(0).shape], [torch.bfloat16])


@contextlib.contextmanager
def manager(inner: dict[str, Any], **changes: Any) -> Iterator[StorageManager]:
    parser = argparse.ArgumentParser()
    add_storage_manager_args(parser)
    options = ["--l1-size-gb", "0.25", "--no-l1-use-lazy", "--eviction-policy", "LRU"]
    options += ["--l2-adapter", json.dumps(adapter_spec(inner, {**SETTINGS, **changes}))]
    storage = StorageManager(parse_args_to_config(parser.parse_args(options)))
    try:
        yield storage
    finally:
        storage.close()


def store(storage: StorageManager, chunks: dict[Any, torch.Tensor]) -> None:
    reserved = storage.reserve_write(list(chunks), LAYOUT)
    for k, x in chunks.items():
        reserved[k].tensor.copy_(x)
    storage.finish_write(list(chunks))


def load(storage: StorageManager, keys: list[Any]) -> dict[Any, torch.Tensor]:
    """What the L2 prefix of these keys gives, with nothing in L1."""
    storage.clear(force=True)
    spec = PrefetchTaskSpec([GroupedObjectKeys(keys, 0, LAYOUT)], lock_mode=PrefetchLockMode.LOCK)
    task = storage.submit_prefetch_task(spec)
    deadline = time.monotonic() + 60
    while (result := storage.query_prefetch_status(task)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    hits = keys[: result.l2_hit_count]
    if not hits:
        return {}
    found, objects = storage.unsafe_read(hits)
    copies = {k: obj.tensor.clone() for k, obj in zip(found, objects, strict=True)}
    storage.finish_read_prefetched(found)
    return copies


def wait_for(folder: Path, files: int) -> list[Path]:
    deadline = time.monotonic() + 60
    while len(found := sorted(folder.glob("*.data"))) != files:
        assert time.monotonic() < deadline, f"{len(found)} files, expected {files}"
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("kind", ["fs", "fs_native"])
def test_a_batch_comes_back_up_to_the_damage(kind: str, tmp_path: Path) -> None:
    keys = [key(i) for i in range(4)]
    source = {k: chunk(256 * i, seed=i) for i, k in enumerate(keys)}
    inner = {"type": kind, "base_path": str(tmp_path)}
    with manager(inner) as storage:
        store(storage, source)
        files = wait_for(tmp_path, 8)
        assert sum(x.nbytes for x in source.values()) / sum(f.stat().st_size for f in files) >= 14
        got = load(storage, keys)
        assert list(got) == keys
        assert all(error(got[k], source[k]) < 0.2 for k in keys)
    (third,) = (f for f in files if keys[2].chunk_hash.hex() in f.name and ".size@" not in f.name)
    third.write_bytes(third.read_bytes()[:-1] + b"\x00")
    with manager(inner) as storage:
        assert list(load(storage, keys)) == keys[:2]
        wait_for(tmp_path, 6)
        storage.clear(force=True)
        store(storage, source)
        wait_for(tmp_path, 8)
        assert list(load(storage, keys)) == keys


def test_chunks_of_pairs_come_back(tmp_path: Path) -> None:
    """Through the serde, with an artifact whose K and V share a basis."""
    artifact = paired_artifact(tmp_path / "registry", 16.0)
    folder = tmp_path / "l2"
    folder.mkdir()
    source = {key(i): chunk(256 * i, seed=i) for i in range(3)}
    inner = {"type": "fs", "base_path": str(folder)}
    with manager(inner, artifact=str(artifact)) as storage:
        store(storage, source)
        files = wait_for(folder, 6)
        assert sum(x.nbytes for x in source.values()) / sum(f.stat().st_size for f in files) >= 14
        got = load(storage, list(source))
        assert all(error(got[k], x) < 0.2 for k, x in source.items())
    # An artifact with a basis each for K and V has blobs of its own.
    with manager(inner) as storage:
        assert load(storage, list(source)) == {}


def test_eviction_takes_blobs_with_their_records(tmp_path: Path) -> None:
    capacity = 200_000
    inner = {
        "type": "fs_native",
        "base_path": str(tmp_path),
        "max_capacity_gb": capacity / 2**30,
        "eviction": {"eviction_policy": "LRU", "trigger_watermark": 0.8, "eviction_ratio": 0.5},
    }
    with manager(inner) as storage:
        for i in range(16):
            store(storage, {key(i): chunk(256, seed=i)})
            time.sleep(0.05)
        deadline = time.monotonic() + 60
        while True:
            files = list(tmp_path.glob("*.data"))
            records = [f for f in files if ".size@" in f.name]
            with contextlib.suppress(FileNotFoundError):
                used = sum(f.stat().st_size for f in files)
                if used <= capacity and len(files) == 2 * len(records) and len(records) < 16:
                    break
            assert time.monotonic() < deadline, (len(files), len(records))
            time.sleep(0.1)
    assert records


def test_refused_layouts_are_counted_and_the_server_lives(tmp_path: Path) -> None:
    counters = transcoder(load_settings(SETTINGS)).counters
    before = counters.snapshot().get("refused_chunks/layout", 0)
    shape = torch.Size((1, 4, 256, 256))
    with manager({"type": "fs", "base_path": str(tmp_path)}) as storage:
        bad = key(1)
        reserved = storage.reserve_write([bad], MemoryLayoutDesc([shape], [torch.bfloat16]))
        reserved[bad].tensor.zero_()
        storage.finish_write([bad])
        good = key(2)
        store(storage, {good: chunk(0)})
        wait_for(tmp_path, 2)
        assert list(load(storage, [good])) == [good]
    assert counters.snapshot()["refused_chunks/layout"] == before + 1
