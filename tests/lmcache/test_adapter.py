"""The sized adapter over real storages: what is stored loads back, and nothing else does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmcache", reason="LMCache is tested by `make test-lmcache`")

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2AdapterListener

from kvtc_vllm.config import ConfigError
from kvtc_vllm.lmcache import adapter as adapter_module
from kvtc_vllm.lmcache.records import blob_key, pack_record, record_key
from kvtc_vllm.lmcache.settings import load_settings
from kvtc_vllm.lmcache.transcoder import transcoder
from tests.lmcache.chunks import SETTINGS, chunk, fused, kv
from tests.lmcache.storage import STORAGES, Client, buffer, key, redis_server, s3_server, sized

CODER = transcoder(load_settings(SETTINGS))
KEYS = [key(i) for i in range(4)]


@pytest.fixture(scope="module")
def blobs() -> dict[Any, bytes]:
    """Containers of varying length under their keys; the last one is raw."""
    found = {k: CODER.encode(chunk(256 * i, seed=i), k) for i, k in enumerate(KEYS[:3])}
    raw = CODER.encode(chunk(100), KEYS[3])
    assert len({len(b) for b in found.values()}) == 3
    assert len(raw) > chunk(0).nbytes
    return {**found, KEYS[3]: raw}


@pytest.fixture(params=STORAGES)
def inner(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """JSON of an empty storage."""
    if request.param == "resp":
        with redis_server(tmp_path) as port:
            yield {"type": "resp", "host": "127.0.0.1", "port": port, "num_workers": 2}
        return
    if request.param == "s3":
        with s3_server() as values:
            yield values
        return
    folder = tmp_path / "l2"
    folder.mkdir()
    yield {"type": request.param, "base_path": str(folder)}


def failures() -> dict[str, int]:
    return {k: v for k, v in CODER.counters.snapshot().items() if k.startswith("failed_loads/")}


def new_failures(before: dict[str, int]) -> dict[str, int]:
    return {
        k.split("/")[1]: v - before.get(k, 0) for k, v in failures().items() if v != before.get(k)
    }


def put(client: Client, stored_key: Any, data: bytes | None) -> None:
    """Replace one object of the storage itself."""
    client.adapter.inner_adapter.delete([stored_key])
    if data is not None:
        assert client.adapter._blocking.store([([stored_key], [buffer(data)])]) == [True]


def record_of(k: Any) -> Any:
    return record_key(k, CODER.namespace(k))


def blob_of(k: Any, length: int) -> Any:
    return blob_key(record_of(k), length)


def test_round_trip_and_restart(inner: dict[str, Any], blobs: dict[Any, bytes]) -> None:
    with sized(inner) as client:
        assert client.lookup(KEYS) == [False] * 4
        assert client.load(KEYS) == [None] * 4
        assert client.store(blobs)
        assert client.lookup([key(9), *KEYS]) == [False, True, True, True, True]
        assert client.load(KEYS, capacity=2 << 20) == list(blobs.values())
    with sized(inner) as client:
        assert client.lookup(KEYS) == [True] * 4
        assert client.load(KEYS, capacity=2 << 20) == list(blobs.values())
        assert client.store(blobs)  # already there
        # A raw chunk does not fit a small buffer; the rest of the batch is not affected.
        before = failures()
        assert client.load(KEYS) == [*list(blobs.values())[:3], None]
        assert new_failures(before) == {"size": 1}
        client.adapter.delete(KEYS[:2])
        assert client.lookup(KEYS) == [False, False, True, False]


def test_refused_chunks_are_left_out(inner: dict[str, Any], blobs: dict[Any, bytes]) -> None:
    with sized(inner) as client:
        assert client.store({KEYS[0]: b"", KEYS[1]: blobs[KEYS[1]]})
        assert client.lookup(KEYS[:2]) == [False, True]
        assert client.store({KEYS[0]: b""})
        assert client.store({key(1, model_name="another/model"): blobs[KEYS[1]]})
        assert client.load([key(1, model_name="another/model")]) == [None]


def test_what_a_crash_leaves_is_replaced(inner: dict[str, Any], blobs: dict[Any, bytes]) -> None:
    first, second = KEYS[:2]
    newer = CODER.encode(chunk(0, seed=77), first)
    assert len(newer) != len(blobs[first])
    with sized(inner) as client:
        assert client.store({k: blobs[k] for k in KEYS[:2]})
        put(client, record_of(first), None)  # crashed between blob and record
        put(client, blob_of(second, len(blobs[second])), None)  # a record whose blob was evicted
        assert client.lookup(KEYS[:2]) == [False, True]
        before = failures()
        assert client.load(KEYS[:2]) == [None, None]
        assert new_failures(before) == {"missing": 1}
        assert client.lookup(KEYS[:2]) == [False, False]
        assert client.store({first: newer, second: blobs[second]})
        assert client.load(KEYS[:2]) == [newer, blobs[second]]


def test_damaged_and_foreign_blobs(inner: dict[str, Any], blobs: dict[Any, bytes]) -> None:
    good = blobs[KEYS[0]]
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    k, v = (x[:, :, 1:] for x in kv(0))  # the second head alone
    other_rank = CODER.encode(fused(k, v), key(0, kv_rank=0x02010201))
    cases = {
        "checksum": bytes(flipped),
        "fingerprint": blobs[KEYS[1]],  # somebody else's chunk under this name
        "geometry": other_rank,  # tensor-parallel rank 1 of 2
        "magic": b"\x80\x04" + bytes(good[2:]),
        "truncated": b"KVTC",
    }
    with sized(inner) as client:
        for reason, data in cases.items():
            assert client.store({k: blobs[k] for k in KEYS[:3]})
            put(client, blob_of(KEYS[0], len(data)), data)
            put(client, record_of(KEYS[0]), pack_record(len(data)))
            before = failures()
            got = client.load(KEYS[:3])
            assert got == [None, blobs[KEYS[1]], blobs[KEYS[2]]], reason
            assert sum(new_failures(before).values()) == 1, reason
            assert set(new_failures(before)) <= {reason, "fingerprint"}, reason
            # Damage is deleted, so that the next store is not skipped.
            assert client.lookup(KEYS[:3]) == [False, True, True]


@pytest.mark.parametrize("length", [0, 24, 1000, "garbage"])
def test_wrong_records(inner: dict[str, Any], blobs: dict[Any, bytes], length: int | str) -> None:
    record = b"\xff" * 24 if length == "garbage" else pack_record(int(length))
    with sized(inner) as client:
        assert client.store({KEYS[0]: blobs[KEYS[0]]})
        put(client, record_of(KEYS[0]), record)
        before = sum(failures().values())
        assert client.load(KEYS[:1]) == [None]
        assert sum(failures().values()) == before + 1
        assert client.store({KEYS[0]: blobs[KEYS[0]]})
        assert client.load(KEYS[:1]) == [blobs[KEYS[0]]]


def test_two_writers_of_the_same_keys(inner: dict[str, Any]) -> None:
    """Whatever order their writes take, a load gives one writer's blob or a miss."""
    versions = [
        {k: CODER.encode(chunk(0, seed=10 * w + i), k) for i, k in enumerate(KEYS)}
        for w in range(2)
    ]
    with sized(inner) as one, sized(inner) as two:
        for _ in range(5):
            threads = [
                threading.Thread(target=client.store, args=(blobs,))
                for client, blobs in zip((one, two), versions, strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for k, got in zip(KEYS, one.load(KEYS), strict=True):
                assert got in (None, versions[0][k], versions[1][k])
            one.adapter.delete(KEYS)
        # On S3 the second writer believes in what the first deleted, until a load fails.
        assert two.load(KEYS) == [None] * 4
        assert two.store(versions[0])
        assert one.load(KEYS) == list(versions[0].values())


class _Recorder(L2AdapterListener):
    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def on_l2_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        self.events += [("stored", k) for k in keys]

    def on_l2_keys_accessed(self, keys: list[Any]) -> None:
        self.events += [("accessed", k) for k in keys]

    def on_l2_keys_deleted(self, keys: list[Any]) -> None:
        self.events += [("deleted", k) for k in keys]


def test_listeners_see_blobs_only(inner: dict[str, Any], blobs: dict[Any, bytes]) -> None:
    with sized(inner) as client:
        recorder = _Recorder()
        client.adapter.register_listener(recorder)
        client.store({KEYS[0]: blobs[KEYS[0]]})
        client.load(KEYS[:1])
        used = client.adapter.get_usage().total_bytes_used
        client.adapter.delete(KEYS[:1])
        assert recorder.events == [(w, KEYS[0]) for w in ("stored", "accessed", "deleted")]
        assert used == len(blobs[KEYS[0]]) + 24
        assert client.adapter.get_usage().total_bytes_used == 0
        assert client.adapter.report_status()["kvtc"]["stored_chunks"] > 0


@pytest.mark.parametrize(
    "values",
    [
        {"type": "nixl_store", "backend": "POSIX"},
        {"type": "plugin", "module_path": "x", "class_name": "y"},
        {"type": "fs", "base_path": "x", "use_odirect": True},
        {"type": "fs", "base_path": "x", "serde": {"type": "fp8"}},
        {"type": "fs"},
        {"type": "no such thing"},
    ],
)
def test_storages_that_do_not_fit_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError), sized(values):
        pass


def test_closing_does_not_wait_for_a_hung_storage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, blobs: dict[Any, bytes]
) -> None:
    monkeypatch.setattr(adapter_module, "CLOSE_SECONDS", 0.3)
    with sized({"type": "fs", "base_path": str(tmp_path)}) as client:
        storage = client.adapter.inner_adapter
        monkeypatch.setattr(storage, "query_load_result", lambda task: None)
        monkeypatch.setattr(storage, "query_lookup_and_lock_result", lambda task: None)
        tasks = [
            client.adapter.submit_load_task(KEYS[:1], [buffer(100)]),
            client.adapter.submit_lookup_and_lock_task(KEYS[:1], {}),
            client.adapter.submit_store_task(KEYS[:1], [buffer(blobs[KEYS[0]])]),
        ]
        closing = client.adapter
    assert isinstance(closing.query_load_result(tasks[0]), Bitmap)
    assert not closing.pop_completed_store_tasks()[tasks[2]].is_successful()
