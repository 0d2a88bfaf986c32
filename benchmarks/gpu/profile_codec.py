"""Where one load and one store spend their time: CUDA calls, kernels and Python functions.

    python -m benchmarks.gpu.profile_codec [--layers 8] [--tokens 8192] [--trace DIRECTORY]

Prints tables, writes no rows: it is for finding what to change. Times under a profiler are longer
than those of `codec_stages`. A trace shows which thread and which stream did what when; Chrome's
`about:tracing` and Perfetto read it.
"""

from __future__ import annotations

import cProfile
import io
import pstats
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu.paged_fixture import PagedFixture
from benchmarks.gpu.report import add_codec, parser, seconds, synchronize
from kvtc_vllm.codec.streams import SideStream

LINES = 28


def main() -> None:
    """Profile a load and a store."""
    made = parser("profile_codec", __doc__)
    made.add_argument("--layers", type=int, default=8, help="layers a group, 0 for all")
    made.add_argument("--tokens", type=int, default=8192)
    made.add_argument("--trace", type=Path, help="directory for load.json.gz and store.json.gz")
    add_codec(made)
    args = made.parse_args()
    device = torch.device(args.device)
    shape, layers, ratio, tokens = "llama-3.1-8b", args.layers, 16.0, args.tokens
    if args.tiny:
        shape, layers, ratio, tokens = "tiny", 2, 4.0, 16
    chunk = 8 if args.tiny else 128
    with SideStream(device).to_end():  # as in serving
        paired = args.kv_basis == "shared"
        fixture = PagedFixture(
            shape, layers, ratio, tokens, device, codec=args.codec, paired=paired
        )
        loads = fixture.loads(chunk, fixture.encode(chunk))
        calls: dict[str, Callable[[], object]] = {
            "load": lambda: fixture.codec.load(loads, chunk),
            "store": lambda: fixture.encode(chunk),
        }
        for name, call in calls.items():
            _profile(name, call, device, args.rounds, args.trace)


def _profile(
    name: str, call: Callable[[], object], device: torch.device, rounds: int, trace: Path | None
) -> None:
    print(f"=== {name}: {seconds(call, device, rounds) * 1e3:.2f} ms, median of {rounds}")
    python = cProfile.Profile()
    python.runcall(call)
    synchronize(device)
    text = io.StringIO()
    pstats.Stats(python, stream=text).sort_stats("tottime").print_stats(LINES)
    print(text.getvalue())
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as traced:
        call()
        synchronize(device)
    if trace is not None:
        trace.mkdir(parents=True, exist_ok=True)
        traced.export_chrome_trace(str(trace / f"{name}.json.gz"))
    for order in ("self_cuda_time_total", "self_cpu_time_total"):
        table = traced.key_averages().table(
            sort_by=order, row_limit=LINES, max_name_column_width=60
        )
        print(_narrow(table))


def _narrow(table: str) -> str:
    """The columns that matter: names, and times of the host and the device."""
    return "\n".join(line[:300] for line in table.splitlines() if set(line) - set("- "))


if __name__ == "__main__":
    main()
