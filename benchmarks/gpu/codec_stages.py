"""Codec throughput by shape, plan, layer grouping, chunk length and load size.

python -m benchmarks.gpu.codec_stages                 # the grid of the headline figures
python -m benchmarks.gpu.codec_stages --full          # everything
python -m benchmarks.gpu.codec_stages --shape llama-3.1-8b --ratio 16 --layers 8
python -m benchmarks.gpu.codec_stages --codec kvtc2   # the same grid with codec 2
python -m benchmarks.gpu.codec_stages --codec kvtc2 --kv-basis shared --layers 4
python -m benchmarks.gpu.codec_stages --device cpu --tiny --out /tmp/rows.json
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch

from benchmarks.gpu.models import SHAPES
from benchmarks.gpu.paged_fixture import PagedFixture
from benchmarks.gpu.report import add_codec, append, parser, seconds
from benchmarks.gpu.stages import product_flops, stage_ms
from benchmarks.gpu.step_stages import step_stage_ms
from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.container import parse
from kvtc_vllm.codec.kernels.deflate_nvcomp import nvcomp_or_none
from kvtc_vllm.codec.streams import SideStream

Case = tuple[str, float, int, int, int]
"""shape, ratio, layers a group (0: all), chunk tokens, load tokens"""
HEADLINE = ("llama-3.1-8b", 16.0, 8, 128, 8192)


def main() -> None:
    """Measure case by case; rows are written as they come, so an interrupted run keeps them."""
    args = _arguments()
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    for case in _cases(args):
        with SideStream(device).to_end():  # as in serving
            of = args.codec, args.kv_basis == "shared"
            row = measure(case, device, args.precision, args.rounds, args.stages, *of)
        append(args.out, [row | {"tf32": args.tf32}], device)


def measure(
    case: Case,
    device: torch.device,
    precision: Any,
    rounds: int,
    stages: bool,
    codec: str = "kvtc",
    paired: bool = False,
) -> dict[str, Any]:
    """One row."""
    shape, ratio, layers, chunk, tokens = case
    fixture = PagedFixture(
        shape, layers, ratio, tokens, device, precision, codec=codec, paired=paired
    )
    blobs = fixture.encode(chunk)
    loads = fixture.loads(chunk, blobs)
    encode = seconds(lambda: fixture.encode(chunk), device, rounds)
    decode = seconds(lambda: fixture.codec.load(loads, chunk), device, rounds)
    failed = [error for error in fixture.codec.load(loads, chunk) if error is not None]
    if failed:
        raise failed[0]
    stored = sum(map(len, blobs))
    row: dict[str, Any] = {
        "bench": "codec",
        "codec": codec,
        "paired": paired,
        "shape": shape,
        "plan": ratio,
        "layers_per_group": layers or SHAPES[shape].layers,
        "chunk_tokens": chunk,
        "load_tokens": tokens,
        "precision": precision,
        "coder": "nvcomp" if device.type == "cuda" and nvcomp_or_none() else "isal threads",
        "raw_bytes": fixture.raw_bytes,
        "stored_bytes": stored,
        "units": _units(blobs),
        "resident_bytes": fixture.codec.resident.nbytes,
        "product_flops": product_flops(fixture),
        "encode_ms": round(encode * 1e3, 4),
        "decode_ms": round(decode * 1e3, 4),
        "encode_gbps": round(fixture.raw_bytes / encode / 1e9, 3),
        "decode_gbps": round(fixture.raw_bytes / decode / 1e9, 3),
    }
    if stages:
        timed = stage_ms if codec == "kvtc" else step_stage_ms
        row["stage_ms"] = timed(fixture, chunk, rounds)
    if device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return row


def _units(blobs: list[Blob]) -> int:
    return sum(len(section.units) for blob in blobs for section in parse(blob).sections)


def _cases(args: argparse.Namespace) -> list[Case]:
    if args.tiny:
        return [("tiny", 4.0, 2, 8, 16)]
    shape, ratio, layers, chunk, tokens = HEADLINE
    if args.full:
        names = [name for name in SHAPES if name != "tiny"]
        grid = itertools.product(names, (8.0, 16.0, 32.0), (0, 16, 8, 4), (64, 128, 256))
        return [
            (*case, size)
            for case in grid
            for size in ((8192,) if case[0] != shape else (1024, 2048, 4096, 8192, 16384, 65536))
        ]
    if args.shape or args.ratio or args.layers is not None or args.chunk or args.tokens:
        return [
            (
                args.shape or shape,
                args.ratio or ratio,
                layers if args.layers is None else args.layers,
                args.chunk or chunk,
                args.tokens or tokens,
            )
        ]
    cases = [HEADLINE]
    cases += [(shape, ratio, other, chunk, tokens) for other in (0, 16, 4)]
    cases += [(shape, other, layers, chunk, tokens) for other in (8.0, 32.0)]
    cases += [(shape, ratio, layers, other, tokens) for other in (64, 256)]
    cases += [(shape, ratio, layers, chunk, other) for other in (1024, 32768)]
    cases += [(other, ratio, layers, chunk, tokens) for other in SHAPES if other != shape][:2]
    return cases


def _arguments() -> argparse.Namespace:
    made = parser("codec_stages", __doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--full", action="store_true", help="the whole grid: hours")
    made.add_argument("--shape", choices=sorted(SHAPES))
    add_codec(made)
    made.add_argument("--ratio", type=float)
    made.add_argument("--layers", type=int, help="layers a group, 0 for all")
    made.add_argument("--chunk", type=int, help="tokens a chunk")
    made.add_argument("--tokens", type=int, help="tokens a load")
    made.add_argument("--precision", choices=("float16", "float32"), default="float16")
    made.add_argument("--tf32", action="store_true", help="float32 products on tensor cores")
    made.add_argument("--stages", action=argparse.BooleanOptionalAction, default=True)
    return made.parse_args()


if __name__ == "__main__":
    main()
