"""What a load and a store should take on a GPU, stage by stage, from what is known without one.

    python -m benchmarks.gpu.roofline llama-3.1-8b 16 [--layers 8] [--tokens 8192]

Bytes and floating-point operations are those of the plan, instructions those of the compiled
kernels, host times are measured here with kernels that do not run: processor time, because a server
has cores for all threads. How they go together is in `timeline`, what is assumed of the GPU in
`GPUS`. Prints a line per stage and appends a row for each GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.offline import compiled  # isort: skip

import torch

from benchmarks.gpu.models import SHAPES, deviations

from benchmarks.gpu.offline.host_path import idle_device, measure  # isort: skip
from benchmarks.gpu.offline.served import CHUNK, Case, ServedCodec  # isort: skip
from benchmarks.gpu.offline.step_tile_costs import step_instructions_per_code  # isort: skip
from benchmarks.gpu.offline.tile_costs import instructions_per_code  # isort: skip
from benchmarks.gpu.report import add_codec, append, parser
from benchmarks.gpu.timeline import NO_HOST, HostTimes, load_seconds, store_seconds
from kvtc_vllm.codec.artifact import KINDS
from kvtc_vllm.codec.entropy import DEFLATE
from kvtc_vllm.codec.kernels.paged_codec import PagedCodec
from kvtc_vllm.codec.kernels.paged_io import gather_rows, scatter_rows
from kvtc_vllm.codec.kernels.paged_reader import LARGEST_WAVE
from kvtc_vllm.codec.kernels.resident import layer_places
from kvtc_vllm.codec.kernels.row_table import RowTable
from kvtc_vllm.codec.kernels.step_payloads import StepPlanPayloads
from kvtc_vllm.codec.payload import BitPlan, encode_payload
from kvtc_vllm.codec.quantizers import REGISTRY
from kvtc_vllm.codec.section_coder import SectionCoder
from kvtc_vllm.codec.v2.codes import encode_codes
from kvtc_vllm.codec.v2.plan import StepPlan

_CAPABILITY = 90
_WARP = 32


@dataclass(frozen=True)
class Gpu:
    """Rates that may be reached, not peaks. All but the memory's are the same chip's.

    memory, bus: bytes per second. products: fp16 operations per second with rows at multiples of
    128 bytes. issue: instructions of warps per second. inflate, deflate: bytes of payload per
    second of nvCOMP. Bus, products, inflate and deflate are what an H100 was seen to do with this
    project's own work; the others are shares of its data sheet.
    """

    memory: float
    bus: float = 55e9
    products: float = 710e12
    issue: float = 132 * 4 * 1.755e9 * 0.55
    inflate: float = 13.4e9
    deflate: float = 65e9


GPUS = {"H100": Gpu(3.35e12 * 0.85), "H200": Gpu(4.8e12 * 0.85)}


@dataclass(frozen=True)
class Stage:
    """What a stage needs. other: seconds at a rate of its own."""

    name: str
    bytes: float = 0.0
    flops: float = 0.0
    instructions: float = 0.0
    other: float = 0.0

    def seconds(self, gpu: Gpu) -> tuple[float, str]:
        """And what bounds it."""
        return max(
            (self.bytes / gpu.memory, "memory"),
            (self.flops / gpu.products, "products"),
            (self.instructions / gpu.issue, "issue"),
            (self.other, self.name),
        )


def main() -> None:
    """Predict and append rows."""
    made = parser("roofline", __doc__)
    made.add_argument("shape", choices=sorted(SHAPES))
    made.add_argument("plan", type=float, help="target ratio")
    made.add_argument("--layers", type=int, default=8, help="layers per group")
    add_codec(made)
    made.add_argument("--tokens", type=int, default=8192)
    args = made.parse_args()
    paired = args.kv_basis == "shared"
    case = Case(args.shape, args.layers, args.plan, codec=args.codec, paired=paired)
    host = measure(case, args.tokens, args.rounds)
    served = ServedCodec(case, 4 * CHUNK, idle_device())
    costs = kernel_instructions(served)
    rows = [
        predict(name, gpu, case, args.tokens, served.codec, costs, host)
        for name, gpu in GPUS.items()
    ]
    append(args.out, rows, torch.device("cpu"))


def kernel_instructions(served: ServedCodec) -> dict[str, float]:
    """Instructions of warps: of a program of gather and scatter, for K and for V, and per code by
    way and bits."""
    found: dict[str, float] = {}
    codec, slots = served.codec, torch.zeros(1, dtype=torch.int64)
    for tensor in KINDS:
        # Serving's kernels have both branches; those of one tensor alone have what a program runs.
        launches = compiled.record(_CAPABILITY)
        places = layer_places(codec.artifact, codec.resident.columns)
        own = [place for place in places if place.tensor == tensor]
        table = RowTable.of(codec.cache, own, codec.resident.row)
        rows = torch.empty(1, codec.resident.row, dtype=codec.row_dtype)
        gather_rows(table, slots, slots, codec.resident.mean, rows.to(codec.resident.operand))
        flags = torch.zeros(1, dtype=torch.int32) if codec.row_dtype == torch.float16 else None
        scatter_rows(table, slots, slots, codec.resident.mean, rows, flags)
        for code in launches.machine_code():
            found[f"{code.name} {tensor}"] = code.instructions * code.threads / _WARP
    codec2 = isinstance(served.codec.coding, StepPlanPayloads)
    tiles = step_instructions_per_code if codec2 else instructions_per_code
    for (way, bits), cost in tiles(_CAPABILITY).items():
        found[f"{way} {bits}"] = cost / _WARP
    return found


def predict(
    name: str,
    gpu: Gpu,
    case: Case,
    tokens: int,
    codec: PagedCodec,
    costs: dict[str, float],
    host: dict[str, Any],
) -> dict[str, Any]:
    """One row: milliseconds by stage, GB/s of raw KV both ways, and what bounds them."""
    raw = tokens * SHAPES[case.shape].token_bytes
    load, store = _stages(case, tokens, codec, costs, gpu)
    waves = -(-tokens // LARGEST_WAVE)
    by_name = {stage.name: stage.seconds(gpu)[0] for stage in (*load, *store)}
    times = HostTimes.of(host)
    device = load_seconds(by_name, NO_HOST, waves)
    decode = load_seconds(by_name, times, waves)
    encoding = store_seconds(by_name, NO_HOST)
    encode = store_seconds(by_name, times)
    for stage in (*load, *store):
        seconds, bound = stage.seconds(gpu)
        print(f"{name} {stage.name:16} {seconds * 1e3:7.3f} ms, bound by {bound}")
    return {
        "bench": "roofline",
        "codec": case.codec,
        "paired": case.paired,
        "gpu": name,
        "shape": case.shape,
        "plan": case.ratio,
        "layers_per_group": case.layers_per_group,
        "load_tokens": tokens,
        "raw_bytes": raw,
        "stage_ms": {n: round(s * 1e3, 4) for n, s in by_name.items()},
        "bound_by": {stage.name: stage.seconds(gpu)[1] for stage in (*load, *store)},
        "decode_device_ms": round(device * 1e3, 4),
        "decode_device_gbps": round(raw / device / 1e9, 1),
        "decode_ms": round(decode * 1e3, 4),
        "decode_gbps": round(raw / decode / 1e9, 1),
        "decode_bound": _largest({"host": decode - device, **_of(load, gpu)}),
        "encode_device_ms": round(encoding * 1e3, 4),
        "encode_device_gbps": round(raw / encoding / 1e9, 1),
        "encode_ms": round(encode * 1e3, 4),
        "encode_gbps": round(raw / encode / 1e9, 1),
        "encode_bound": _largest({"host": encode - encoding, **_of(store, gpu)}),
        "host": host,
    }


def _of(stages: list[Stage], gpu: Gpu) -> dict[str, float]:
    return {stage.name: stage.seconds(gpu)[0] for stage in stages}


def _largest(seconds: dict[str, float]) -> str:
    return max(seconds, key=lambda name: seconds[name])


def _stages(
    case: Case, tokens: int, codec: PagedCodec, costs: dict[str, float], gpu: Gpu
) -> tuple[list[Stage], list[Stage]]:
    """Of a load, of a store; over all layer groups."""
    shape, resident = SHAPES[case.shape], codec.resident
    cache = tokens * shape.token_bytes * case.dtype.itemsize / 2
    elements = tokens * shape.token_bytes / 2
    payload = stored = flops = columns = bases = 0.0
    unpack = pack = 0.0
    for key in resident.keys:
        plan, width = codec.coding.plans[key], resident.width(*key)
        row = resident.geometry.row_size(*key)
        raw, kept = (size / CHUNK * tokens for size in chunk_bytes(plan, row))
        payload += raw
        stored += kept
        flops += 2.0 * tokens * row * width
        columns += tokens * width
        bases += row * width * 2
        for bits, codes in codes_by_bits(plan).items():
            # Codec 2 reads codes twice: to count escapes, which is less than half the work.
            unpack += tokens * codes * costs[f"unpack {bits}"]
            pack += tokens * codes * (costs[f"pack {bits}"] + costs.get(f"escapes {bits}", 0.0))
    rows = elements * codec.row_dtype.itemsize
    gathering, scattering = (
        tokens * shape.layers * (costs[f"{kernel} k"] + costs[f"{kernel} v"])
        for kernel in ("_gather_kernel", "_scatter_kernel")
    )
    load = [
        Stage("upload", other=stored / gpu.bus),
        Stage("inflate", other=payload / gpu.inflate),
        Stage("unpack", bytes=payload + 2 * columns, instructions=unpack),
        Stage("decode product", bytes=2 * columns + bases + rows, flops=flops),
        Stage("scatter", bytes=rows + cache, instructions=scattering),
    ]
    store = [
        Stage("gather", bytes=cache + 2 * elements, instructions=gathering),
        Stage("encode product", bytes=2 * elements + bases + 4 * columns, flops=flops),
        Stage("range", bytes=4 * columns),
        Stage("pack", bytes=4 * columns + payload, instructions=pack),
        Stage("deflate", other=payload / gpu.deflate),
        Stage("collect", bytes=2 * stored),
        Stage("download", other=stored / gpu.bus),
    ]
    return load, store


def codes_by_bits(plan: SectionCoder) -> dict[int, int]:
    """Codes per token of each width."""
    found: dict[int, int] = {}
    if isinstance(plan, StepPlan):
        return {part.width: len(part.columns) for part in plan.packed}
    assert isinstance(plan, BitPlan)
    for part in plan.groups:
        bits = REGISTRY[part.type].bits
        found[bits] = found.get(bits, 0) + part.size
    return found


def chunk_bytes(plan: SectionCoder, row: int) -> tuple[int, int]:
    """Raw and stored bytes of a chunk of `models`' synthetic data."""
    key = (plan, row)
    if key not in _BYTES:
        drawn = torch.Generator().manual_seed(1)
        uniform = torch.rand((CHUNK, plan.rank), generator=drawn).clamp(1e-6, 1 - 1e-6) - 0.5
        laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs())
        x = laplace / 2**0.5 * deviations(row, plan.rank, torch.device("cpu"))
        if isinstance(plan, StepPlan):
            streams = encode_codes(plan.quantise(x), plan.packed)
        else:
            assert isinstance(plan, BitPlan)
            streams = encode_payload(x, plan)
        _BYTES[key] = sum(map(len, streams)), len(DEFLATE.encode(streams).body)
    return _BYTES[key]


_BYTES: dict[tuple[SectionCoder, int], tuple[int, int]] = {}


if __name__ == "__main__":
    main()
