"""vLLM, an LMCache server and KVTC end to end, against our own connector.

Each test starts one engine, and relies on what the engines before it stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmcache", reason="LMCache is tested by `make test-lmcache`")

from tests.lmcache.server import lmcache_server, run_client
from tests.lmcache.storage import redis_server

pytestmark = pytest.mark.vllm

PROMPTS, TOKENS, CHUNK = 3, 1100, 256
LOADED = TOKENS // CHUNK * CHUNK
CHUNKS = PROMPTS * LOADED // CHUNK
RAW_CHUNK = CHUNK * 8 * 2 * 128 * 2
ASK = {"prompts": PROMPTS, "tokens": TOKENS}


@dataclass(frozen=True)
class Stored:
    """What one engine said and its server stored, with the preset's overrides for another one."""

    said: dict[str, Any]
    counters: dict[str, int]
    place: dict[str, Any]


@pytest.fixture(scope="module")
def own_connector(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Our connector with the same artifact, plan and chunks, and the same tokens loaded."""
    kvtc = {"ratio": 16, "chunk_tokens": CHUNK, "recent_window": 64, "load_gate": False}
    return run_client(tmp_path_factory.mktemp("own") / "client.log", kvtc=kvtc, **ASK)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Stored in a directory by a server that was then killed."""
    logs = tmp_path_factory.mktemp("fs")
    place = {"l2.base_path": str(logs / "l2")}
    with lmcache_server(logs / "server.log", "fs", place) as server:
        port = {"lmcache_port": server.port}
        said = run_client(logs / "client.log", **port, **ASK, linger=3)
        counters = server.counters()
        server.kill()
    return Stored(said, counters, place)


@pytest.fixture(scope="module")
def in_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    """Stored in a Redis with server-driven copies, whose positions come as events."""
    logs = tmp_path_factory.mktemp("redis")
    with redis_server(logs) as port:
        place = {"l2.host": "127.0.0.1", "l2.port": port}
        with lmcache_server(logs / "server.log", "redis", place) as server:
            request = {"lmcache_port": server.port, "transfer": "lmcache_driven", "linger": 3}
            said = run_client(logs / "client.log", **request, **ASK)
            counters = server.counters()
        yield Stored(said, counters, place)


def check_stored(stored: Stored) -> None:
    assert stored.said["cached"] == [0] * PROMPTS
    assert stored.counters["stored_chunks"] == CHUNKS
    assert stored.counters["stored_raw_bytes"] == CHUNKS * RAW_CHUNK
    assert stored.counters["stored_raw_bytes"] / stored.counters["stored_bytes"] >= 14


def test_our_own_connector(own_connector: dict[str, Any]) -> None:
    assert own_connector["cached"] == [LOADED] * PROMPTS


def test_stored_on_disk_with_positions_from_the_data(on_disk: Stored) -> None:
    check_stored(on_disk)
    assert on_disk.counters["position_recovered"] == CHUNKS
    files = list(Path(on_disk.place["l2.base_path"]).iterdir())
    assert len(files) == 2 * CHUNKS
    assert CHUNKS * RAW_CHUNK / sum(path.stat().st_size for path in files) >= 14


def test_loaded_after_the_server_was_killed(
    on_disk: Stored, own_connector: dict[str, Any], tmp_path: Path
) -> None:
    """One prompt's first chunk is damaged: that prompt is recomputed, the others are loaded."""
    files = Path(on_disk.place["l2.base_path"]).iterdir()
    # First chunks are the largest: their sinks are exact.
    first_chunk = sorted(files, key=lambda path: path.stat().st_size)[-PROMPTS]
    data = bytearray(first_chunk.read_bytes())
    data[len(data) // 2] ^= 0x04
    first_chunk.write_bytes(data)
    with lmcache_server(tmp_path / "server.log", "fs", on_disk.place) as server:
        again = run_client(tmp_path / "client.log", lmcache_port=server.port, **ASK)
        counters = server.counters()
        assert server.process.poll() is None
    assert sorted(again["cached"]) == [0, LOADED, LOADED]
    assert counters["failed_loads/checksum"] == 1
    assert counters["loaded_chunks"] >= 2 * LOADED // CHUNK
    for i, cached in enumerate(again["cached"]):
        expected = own_connector if cached else on_disk.said
        assert again["answers"][i] == expected["answers"][i]


def test_stored_in_redis_with_positions_from_events(in_redis: Stored) -> None:
    check_stored(in_redis)
    assert in_redis.counters["position_event"] > 0


def test_another_engine_loads_from_redis(
    in_redis: Stored, own_connector: dict[str, Any], tmp_path: Path
) -> None:
    with lmcache_server(tmp_path / "server.log", "redis", in_redis.place) as server:
        shared = run_client(tmp_path / "client.log", lmcache_port=server.port, **ASK)
        counters = server.counters()
    assert shared["cached"] == [LOADED] * PROMPTS
    assert shared["answers"] == own_connector["answers"]
    assert counters["loaded_chunks"] == CHUNKS
