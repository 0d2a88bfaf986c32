"""What the host does for one load and one store, without a GPU.

    python -m benchmarks.gpu.offline.host_path [--layers 8] [--tokens 8192] [--out FILE]
    python -m benchmarks.gpu.offline.host_path --codec kvtc2 --kv-basis shared --layers 4

Kernels are compiled and not run, products and copies of rows counted and left out, nvCOMP takes no
time: what remains is the host's work, which a GPU would wait for or hide. The blobs of a round are
freed after the next: as in a full tier, new ones find memory that others have left. Best of several
rounds; cores of machines differ, so only ratios of rows of one machine mean something.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.offline import compiled  # isort: skip

import torch

from benchmarks.gpu.offline.floor import floor_ms  # isort: skip
from benchmarks.gpu.offline.idle_nvcomp import IdleNvcomp  # isort: skip
from benchmarks.gpu.offline.served import (  # isort: skip
    CHUNK,
    Case,
    LeftOut,
    ServedCodec,
    without_products,
)
from benchmarks.gpu.offline.torch_calls import TorchCalls  # isort: skip
from benchmarks.gpu.report import add_codec  # isort: skip
from kvtc_vllm.codec.kernels import deflate_nvcomp, unit_coders, uploads  # isort: skip
from kvtc_vllm.codec.kernels.unit_coders import NvcompUnitCoder  # isort: skip

RESULTS = Path(__file__).resolve().parents[2] / "results" / "gpu" / "host_path.json"
_CAPABILITY = 90
_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time, "thread": time.thread_time}


def main() -> None:
    """Measure and append a row."""
    made = argparse.ArgumentParser(prog="benchmarks.gpu.offline.host_path", description=__doc__)
    made.add_argument("--shape", default="llama-3.1-8b")
    made.add_argument("--layers", type=int, default=8, help="layers per group")
    made.add_argument("--ratio", type=float, default=16.0)
    made.add_argument("--tokens", type=int, default=8192)
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--tree", default="", help="a name for the code that is measured")
    made.add_argument("--out", type=Path, default=RESULTS)
    add_codec(made)
    args = made.parse_args()
    paired = args.kv_basis == "shared"
    case = Case(args.shape, args.layers, args.ratio, codec=args.codec, paired=paired)
    row = {"bench": "host_path", **vars(args), **measure(case, args.tokens, args.rounds)}
    row.pop("out")
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps([*rows, row], indent=1) + "\n")
    print(json.dumps(row))


def idle_device() -> NvcompUnitCoder:
    """nvCOMP that takes no time, on a device that is done at once; for the rest of the process.

    What the device would copy is not copied: the host would do that here.
    """
    compiled.record(_CAPABILITY)
    without_products()
    uploads.UploadedBlobs.send = lambda self, blobs: None  # type: ignore[method-assign]
    bodies: list[torch.Tensor] = []

    def collect(self: Any, places: Any, size: int) -> torch.Tensor:
        if not bodies or len(bodies[0]) < size:
            bodies[:] = [torch.zeros(size, dtype=torch.uint8)]
        return bodies[0][:size]

    unit_coders._NvcompUnits.collect = collect  # type: ignore[method-assign]
    return NvcompUnitCoder(deflate_nvcomp.NvcompDeflate(IdleNvcomp()))


def measure(case: Case, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds: wall time, CPU time of all threads and of the calling one, the longest stretch
    without another thread; pages of memory that were touched for the first time; of that time, what
    copies and checksums of the blobs take alone (`floor`). Kernel launches by name, calls of torch
    by sort."""
    served = ServedCodec(case, tokens, idle_device())
    chunks = range(tokens // CHUNK)
    blobs = served.store(chunks)
    served.load(chunks, blobs)
    sizes = [len(blob) for blob in blobs]
    found: dict[str, Any] = {"stored_bytes": sum(sizes), **floor_ms(sizes, rounds)}
    found |= _timed("load", lambda: served.load(chunks, blobs), rounds)
    for what, owner, method in (
        ("upload", uploads.UploadedBlobs, "send"),
        ("inflate", IdleNvcomp, "decompress"),
    ):
        found |= _until_first(what, owner, method, served, chunks, blobs, rounds)
    found |= _timed("store", lambda: served.store(chunks), rounds)
    found["store_after_device_ms"] = _after_device(served, chunks, rounds)
    found |= _launches("load", lambda: served.load(chunks, blobs))
    found |= _launches("store", lambda: served.store(chunks))
    return found


def _launches(way: str, call: Callable[[], object]) -> dict[str, dict[str, int]]:
    """Of Triton's kernels by name, `all` of them together; what the calling thread has torch do."""
    launches = compiled.record(_CAPABILITY)
    LeftOut.products = LeftOut.copies = 0
    with TorchCalls() as torch_calls:
        call()
    calls = torch_calls.by_sort()
    calls["work"] += LeftOut.copies
    return {
        f"{way}_launches": {"all": len(launches.names), **Counter(launches.names)},
        f"{way}_torch_calls": {**calls, "products": LeftOut.products},
    }


def _after_device(served: ServedCodec, chunks: range, rounds: int) -> float:
    """CPU time of the calling thread from when the sizes of the units are known, so that nothing on
    the device hides it."""
    names = vars(deflate_nvcomp)
    wait = names["synchronize"]
    known: list[float] = []
    names["synchronize"] = lambda device: known.append(time.thread_time())
    times: list[float] = []
    try:
        for _ in range(rounds):
            known.clear()
            served.store(chunks)
            # Several steps, if there are, overlap with nothing but their own.
            times.append(time.thread_time() - known[0])
    finally:
        names["synchronize"] = wait
    return _best(times)


def _timed(name: str, call: Callable[[], object], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {clock: [] for clock in _CLOCKS}
    pages: list[int] = []
    kept: object = None
    for _ in range(rounds):
        before, began = _new_pages(), _now()
        made = call()
        for clock, now in _now().items():
            times[clock].append(now - began[clock])
        pages.append(_new_pages() - before)
        kept = made  # what the round before made is freed now, in nobody's time
    del kept
    held = [_longest_stretch(call) for _ in range(rounds)]
    return {
        **{f"{name}_{clock}_ms": _best(found) for clock, found in times.items()},
        f"{name}_longest_stretch_ms": _best(held),
        f"{name}_new_pages": int(statistics.median(pages)),
    }


def _longest_stretch(call: Callable[[], object]) -> float:
    """The longest time that a thread which wants nothing but to run could not.

    Run as root, it has priority over the threads that it watches, so it waits for Python's lock
    and hardly for a core.
    """
    gaps = [0.0]
    stop = threading.Event()

    def run() -> None:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -20)
        last = time.perf_counter()
        while not stop.is_set():
            time.sleep(0)
            now = time.perf_counter()
            gaps[0] = max(gaps[0], now - last)
            last = now

    interval = sys.getswitchinterval()
    # Bytecode gives way at once: what is left are calls that keep the lock.
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        made = call()
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    del made  # the tier keeps blobs: freeing all of them at once is no part of a store
    return gaps[0]


def _until_first(
    what: str,
    owner: type,
    method: str,
    served: ServedCodec,
    chunks: range,
    blobs: list[Any],
    rounds: int,
) -> dict[str, float]:
    """Of a load until it first calls a method: wall time, CPU time of all threads and of the
    calling one."""
    call = vars(owner)[method]
    first: list[dict[str, float]] = []

    def noted(*args: Any) -> Any:
        if not first:
            first.append(_now())
        return call(*args)

    setattr(owner, method, noted)
    times: dict[str, list[float]] = {clock: [] for clock in _CLOCKS}
    try:
        for _ in range(rounds):
            first.clear()
            began = _now()
            served.load(chunks, blobs)
            for clock, now in first[0].items():
                times[clock].append(now - began[clock])
    finally:
        setattr(owner, method, call)
    names = {"wall": "", "cpu": "_cpu", "thread": "_thread"}
    return {f"load_first_{what}{names[clock]}_ms": _best(found) for clock, found in times.items()}


def _new_pages() -> int:
    """Pages that the process was given memory for so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _now() -> dict[str, float]:
    return {clock: read() for clock, read in _CLOCKS.items()}


def _best(seconds: list[float]) -> float:
    return round(min(seconds) * 1e3, 3)


if __name__ == "__main__":
    main()
