"""Inter-token latency of running requests, encoder idle and busy.

    python -m benchmarks.gpu.interference

An 8B-shaped model decodes a batch on the main stream while a thread encodes chunks without pause
on a stream of its own, as the connector's worker does. CUDA's default priority is already the
lowest: only raising the model's (--prefer-model) sets the two apart.
"""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import AbstractContextManager, nullcontext

import torch

from benchmarks.gpu.paged_fixture import PagedFixture
from benchmarks.gpu.random_model import TINY, ModelShape, RandomModel
from benchmarks.gpu.report import append, parser, synchronize


def main() -> None:
    """Measure and append one row."""
    made = parser("interference", __doc__)
    made.add_argument("--batch", type=int, default=32)
    made.add_argument("--context", type=int, default=2048)
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--prefer-model", action="store_true", help="model on a high-priority stream")
    args = made.parse_args()
    device = torch.device(args.device)
    if args.tiny:
        args.batch, args.context, args.steps = 2, 8, 5
    shape = TINY if args.tiny else ModelShape()
    model = RandomModel(shape, device, args.context + 1, args.batch)
    case = ("tiny", 2, 4.0, 16) if args.tiny else ("llama-3.1-8b", 8, 16.0, 2048)
    fixture = PagedFixture(*case, device, workspace_bytes=256 << 20)
    chunk = 8 if args.tiny else 128
    with _own_stream(device, priority=0):
        fixture.encode(chunk)
    priority = -1 if args.prefer_model else 0
    idle = _latencies(model, args.batch, args.context, args.steps, priority)
    stop = threading.Event()
    encoded: list[int] = []
    thread = threading.Thread(target=_encode, args=(fixture, chunk, stop, encoded))
    thread.start()
    try:
        busy = _latencies(model, args.batch, args.context, args.steps, priority)
    finally:
        stop.set()
        thread.join()
    again = _latencies(model, args.batch, args.context, args.steps, priority)
    baseline = statistics.median(idle + again)
    row = {
        "bench": "interference",
        "batch": args.batch,
        "context": args.context,
        "prefer_model": args.prefer_model,
        "idle_ms": round(baseline * 1e3, 4),
        "busy_ms": round(statistics.median(busy) * 1e3, 4),
        "busy_p99_ms": round(sorted(busy)[int(0.99 * (len(busy) - 1))] * 1e3, 4),
        "idle_p99_ms": round(sorted(idle)[int(0.99 * (len(idle) - 1))] * 1e3, 4),
        "slowdown": round(statistics.median(busy) / baseline - 1, 4),
        "encode_gbps": round(fixture.raw_bytes * len(encoded) / sum(busy) / 1e9, 3),
    }
    append(args.out, [row], device)


def _latencies(
    model: RandomModel, batch: int, context: int, steps: int, priority: int
) -> list[float]:
    x = model.tokens(batch, 1)
    model.forward(x, context)
    synchronize(model.device)
    times: list[float] = []
    with _own_stream(model.device, priority):
        for _ in range(steps):
            started = time.perf_counter()
            model.forward(x, context)
            if model.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
            times.append(time.perf_counter() - started)
    return times


def _encode(fixture: PagedFixture, chunk: int, stop: threading.Event, encoded: list[int]) -> None:
    with _own_stream(fixture.codec.device, priority=0):
        while not stop.is_set():
            encoded.append(len(fixture.encode(chunk)))


def _own_stream(device: torch.device, priority: int) -> AbstractContextManager[object]:
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device, priority=priority))


if __name__ == "__main__":
    main()
