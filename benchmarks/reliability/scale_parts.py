"""What `benchmarks.reliability.scale` measures: a function per part, of one size."""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHUNK_BYTES = 20_000
PREFIX = 256
"""Chunks of 128 tokens in 32K tokens."""
LOOK_UPS = 20
PINNED = (1_000, 16_384, 65_536)
Row = dict[str, float]


def cpu(call: Callable[[], object], times: int = 1) -> float:
    """Median processor seconds of a call."""
    samples = []
    for _ in range(times):
        began = time.process_time()
        call()
        samples.append(time.process_time() - began)
    return statistics.median(samples)


def full_collection() -> float:
    """Processor seconds of one, after one that is not counted."""
    gc.collect()
    return cpu(gc.collect, 3)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def key_of(number: int) -> bytes:
    """Spread like hashes, and quick to make."""
    return ((number * 0x9E3779B97F4A7C15) % 2**64).to_bytes(8, "big") + number.to_bytes(24, "big")


class Pauses:
    """A thread that asks for Python's lock every millisecond. Milliseconds.

    What counts is the processor time that the main thread takes between two of its turns: time in
    which other programs run is not in it. Python asks for the lock after 5 ms only.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._longest = 0.0
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def _tick(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        clock = time.pthread_getcpuclockid(main)
        last = time.clock_gettime(clock)
        while not self._stop.is_set():
            time.sleep(0.001)
            now = time.clock_gettime(clock)
            self._longest = max(self._longest, now - last)
            last = now

    def end(self) -> float:
        self._stop.set()
        self._thread.join()
        return 1e3 * self._longest


# ----------------------------------------------------------------------------- indexes


def index(size: int) -> Row:
    """Memory and disk index of the scheduler, both policies."""
    found: Row = {}
    for policy in ("lru", "arc"):
        found |= {f"memory index, {policy}: {name}": v for name, v in _memory(size, policy).items()}
        gc.collect()
        found |= {f"disk index, {policy}: {name}": v for name, v in _disk(size, policy).items()}
        gc.collect()
    return found


def _memory(size: int, policy: str) -> Row:
    from kvtc_vllm.tiers import policies
    from kvtc_vllm.tiers.index import TierIndex

    before = resident()
    capacity = size * CHUNK_BYTES
    tier: Any = TierIndex(capacity, 1, policies.REGISTRY[policy](capacity))
    gc.disable()
    for number in range(size):
        key = key_of(number)
        tier.reserve(key, CHUNK_BYTES)
        tier.commit(key, 0, CHUNK_BYTES)
    gc.enable()
    row: Row = {"bytes per chunk, key included": (resident() - before) / size}
    prefix = [key_of(size // 2 + number) for number in range(PREFIX)]
    row["hit of 256, us"] = 1e6 * cpu(lambda: tier.hit(prefix), 99)
    row["look-up of 256, us"] = 1e6 * cpu(lambda: [tier.is_ready(key) for key in prefix], 99)
    fresh = iter(range(size, 2 * size))
    row["store that evicts, us"] = 1e6 * cpu(lambda: _store(tier, fresh), 1999)
    for pins in PINNED:
        if pins < size // 2 and size <= 1_000_000:
            row[f"store with {pins} pinned cold, us"] = 1e6 * _with_pins(tier, fresh, pins, size)
    row["full collection, ms"] = 1e3 * full_collection()
    row["clear, ms"] = 1e3 * cpu(tier.clear)
    return row


def _store(tier: Any, fresh: Any) -> None:
    key = key_of(next(fresh))
    tier.reserve(key, CHUNK_BYTES)
    tier.commit(key, 0, CHUNK_BYTES)
    tier.take_evicted()
    tier.take_victims()


def _with_pins(tier: Any, fresh: Any, pins: int, size: int) -> float:
    """Seconds of a store while what would go next is pinned."""
    # Keys are stored in the order of their numbers.
    oldest = (key for key in map(key_of, range(2 * size)) if tier.is_ready(key))
    pinned = tier.pin(islice(oldest, pins))
    seconds = cpu(lambda: _store(tier, fresh), 49)
    tier.unpin(pinned)
    return seconds


def _disk(size: int, policy: str) -> Row:
    from kvtc_vllm.tiers import policies
    from kvtc_vllm.tiers.disk_index import DiskIndex

    capacity = 2 * size * CHUNK_BYTES
    tier: Any = DiskIndex(capacity, 1, policies.REGISTRY[policy](capacity))
    listed = [(key_of(number), CHUNK_BYTES) for number in range(size)]
    before = resident()
    row: Row = {"restore, s": cpu(lambda: tier.restore({0: listed}))}
    row["bytes per chunk, without key"] = (resident() - before) / size
    listed.clear()
    prefix = [key_of(size // 2 + number) for number in range(PREFIX)]
    row["hit of 256, us"] = 1e6 * cpu(lambda: tier.hit(prefix), 99)
    fresh = iter(range(size, 2 * size))
    row["add, us"] = 1e6 * cpu(lambda: tier.add(key_of(next(fresh)), 0, CHUNK_BYTES), 999)
    row["full collection, ms"] = 1e3 * full_collection()
    return row


# -------------------------------------------------------------------------------- disk


def disk(size: int) -> Row:
    """Sparse files of 20 KB in one namespace."""
    from kvtc_vllm.tiers.disk import DiskStore
    from kvtc_vllm.tiers.disk.store import LISTED_FROM
    from tests.reliability.blobs import NAMESPACE, blob_of
    from tests.reliability.blobs import key_of as blob_key

    place = tempfile.mkdtemp(prefix="kvtc-scale-", dir=os.environ.get("KVTC_SCALE_ROOT"))
    try:
        root = Path(place) / "tier"
        used = size * (-(-CHUNK_BYTES // 4096) * 4096)
        DiskStore(root, NAMESPACE, min_free=0).close()
        _make_files(root / NAMESPACE.hex(), size)
        row: Row = _Told()
        store: Any = DiskStore(root, NAMESPACE, capacity=used + (1 << 30), min_free=0)
        began = time.perf_counter()
        row["scan, s"] = cpu(store.scan)
        row["scan, elapsed s"] = time.perf_counter() - began
        row["pause in a scan, ms"] = _pause(lambda: _take(store.scan()))
        row["others wait for the lock in a scan, elapsed ms"] = _lock_wait(root, store.scan)
        if size >= LISTED_FROM:
            until = time.monotonic() + 600
            row["list of files, s"] = cpu(lambda: store.keep_list(until))
            began = time.perf_counter()
            row["scan with a list, s"] = cpu(store.scan)
            row["scan with a list, elapsed s"] = time.perf_counter() - began
            wait = _lock_wait(root, store.scan)
            row["others wait for the lock in a scan with a list, elapsed ms"] = wait
        keys = [blob_key(number) for number in range(400)]
        blobs = [blob_of(key) for key in keys]
        write = iter(zip(keys, blobs, strict=True))
        row["write, us"] = 1e6 * cpu(lambda: store.write(*next(write)), 99)
        row["read, us"] = 1e6 * cpu(lambda: store.read(keys[0]), 99)
        store.close()
        tight: Any = DiskStore(root, NAMESPACE, capacity=used, min_free=0)
        row["others wait for the lock in a survey, elapsed ms"] = _lock_wait(
            root,
            lambda: row.__setitem__(
                "write that surveys, s", cpu(lambda: tight.write(*next(write)))
            ),
        )
        row["write that evicts, us"] = 1e6 * cpu(lambda: tight.write(*next(write)), 99)
        tight.close()
        began = time.perf_counter()
        command = [sys.executable, "-m", "kvtc_vllm.cli", "gc", str(root)]
        subprocess.run([*command, "--capacity", str(used // 2)], check=True, capture_output=True)
        row["gc to half, elapsed s"] = time.perf_counter() - began
        left = sum(len(files) for _, _, files in os.walk(root / NAMESPACE.hex()))
        row["left after gc to half, %"] = round(100 * left / size, 1)
        began = time.perf_counter()
        dropping: Any = DiskStore(root, NAMESPACE, min_free=0)
        row["remove all, s"] = cpu(dropping.drop)
        return row
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _take(found: list[Any]) -> None:
    """As the worker takes them: to free all at once would be a pause of its own."""
    found.reverse()
    while found:
        found.pop()


class _Told(dict[str, float]):
    """Says every entry at once: with a million files the last one comes late."""

    def __setitem__(self, name: str, value: float) -> None:
        print(f"{name}: {value:.3f}", file=sys.stderr, flush=True)
        super().__setitem__(name, value)


def _make_files(directory: Path, size: int) -> None:
    for number in range(256):
        (directory / f"{number:02x}").mkdir(mode=0o700, exist_ok=True)
    for number in range(size):
        name = key_of(number).hex()
        fd = os.open(f"{directory}/{name[:2]}/{name}.kvtc", os.O_CREAT | os.O_WRONLY, 0o600)
        os.ftruncate(fd, CHUNK_BYTES)
        os.utime(fd, ns=(number, number))
        os.close(fd)


def _pause(call: Callable[[], object]) -> float:
    pauses = Pauses()
    call()
    return pauses.end()


_WAITER = """
import sys, time
from kvtc_vllm.tiers.disk import DiskStore, DiskError
from tests.reliability.blobs import NAMESPACE, key_of
store = DiskStore(sys.argv[1], NAMESPACE, capacity=1 << 50, min_free=0, lock_wait_seconds=600)
print("ready", flush=True)
worst, until = 0.0, None
import select
while not select.select([sys.stdin], [], [], 0)[0]:
    began = time.perf_counter()
    store.remove([key_of(10**9)])
    worst = max(worst, time.perf_counter() - began)
    time.sleep(0.02)
print(1e3 * worst)
"""


def _lock_wait(root: Path, call: Callable[[], object]) -> float:
    """The longest that another process waits for the root's lock: elapsed milliseconds."""
    command = [sys.executable, "-c", _WAITER, str(root)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as waiter:
        assert waiter.stdout is not None
        waiter.stdout.readline()
        call()
        printed, _ = waiter.communicate("end\n", timeout=900)
    return float(printed.split()[-1])


# --------------------------------------------------------------------------- scheduler


def scheduler(size: int) -> Row:
    """Requests that wait for disk, asked about in every step."""
    from tests.connector.fakes import FakeOutput, FakeRequest
    from tests.connector.fakes import scheduler as make

    tokens = 128 * PREFIX
    side: Any = make(
        memory_bytes=f"{2 * size * PREFIX * 6000}",
        disk_path="/nowhere",
        disk_bytes="1TiB",
        recent_window=0,
        load_gate=False,
        load_deadline=600,
    )
    requests = [FakeRequest(f"r{number}", tokens + 1, name=f"n{number}") for number in range(size)]
    on_disk = [
        (request.block_hashes[4 * chunk + 3], 4096)
        for request in requests
        for chunk in range(PREFIX)
    ]
    side.restore({0: on_disk})
    gc.collect()

    def poll() -> None:
        assert all(side.match(request, 0) is None for request in requests)

    row: Row = {"first look at all, ms": 1e3 * cpu(poll)}
    side.plan_step(FakeOutput())
    row["a poll of all that wait, ms"] = 1e3 * cpu(poll, 21)
    # Made before: a request's hashes are vLLM's work.
    nowhere = FakeRequest("nowhere", tokens + 1, name="nowhere")
    row["one look-up of 32K tokens that no tier has, us"] = 1e6 * _look_up(side, nowhere)
    in_memory = FakeRequest("in memory", tokens + 1, name="memory")
    for chunk in range(PREFIX):
        side.index.reserve(in_memory.block_hashes[4 * chunk + 3], 4096)
        side.index.commit(in_memory.block_hashes[4 * chunk + 3], 0, 4096)
    row["one look-up of 32K tokens that memory has, us"] = 1e6 * _look_up(side, in_memory)
    return row


def _look_up(side: Any, request: Any) -> float:
    """Processor seconds of one, after the first."""
    side.match(request, 0)
    return cpu(lambda: [side.match(request, 0) for _ in range(LOOK_UPS)], 21) / LOOK_UPS
