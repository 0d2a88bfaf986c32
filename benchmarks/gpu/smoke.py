"""The first thing to run on a GPU: does everything work, and agree with the CPU?

    python -m benchmarks.gpu.smoke

Prints one line a check and goes on after a failure, so that one run shows all of them; ends with
status 1 if any failed. The pytest tests marked `gpu` are the thorough version.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.models import SHAPES, rope_table
from benchmarks.gpu.paged_fixture import PagedFixture
from benchmarks.gpu.report import machine, parser
from kvtc_vllm.codec.entropy import DEFLATE
from kvtc_vllm.codec.kernels.deflate_nvcomp import NVCOMP, NvcompDeflate
from kvtc_vllm.codec.kernels.paged import PagedCache, PagedTensor, block_slots
from kvtc_vllm.codec.kernels.paged_io import gather_rows, scatter_rows
from kvtc_vllm.codec.kernels.row_table import LayerPlace, RowTable
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.streams import SideStream

CHUNK = 8


def main() -> None:
    """Run every check."""
    args = parser("smoke", __doc__).parse_args()
    device = torch.device(args.device)
    print(machine(device))
    checks: list[tuple[str, Callable[[torch.device], str]]] = [
        ("kernels against the CPU codec", check_codec),
        ("codec 2 against the CPU codec", partial(check_codec, codec="kvtc2")),
        ("the same with K and V as pairs", partial(check_codec, codec="kvtc2", paired=True)),
        ("RoPE out and in again", check_rope),
    ]
    if device.type == "cuda":
        checks += [
            ("nvCOMP reads isal", check_reads_isal),
            ("isal reads nvCOMP", check_isal_reads),
            ("an 8K load of the 8B shape", check_large),
            ("the same with codec 2", partial(check_large, codec="kvtc2")),
        ]
    failed = 0
    for name, check in checks:
        try:
            with SideStream(device).to_end():  # as in serving
                found = check(device)
            print(f"ok      {name}: {found}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
    sys.exit(failed > 0)


def check_codec(device: torch.device, codec: str = "kvtc", paired: bool = False) -> str:
    """Blobs decode with the CPU codec to what the fast path loads."""
    fixture = PagedFixture("tiny", 2, 4.0, 16, device, codec=codec, paired=paired)
    blobs = fixture.encode(CHUNK)
    reference = open_codec(
        codec, fixture.codec.dtype, artifact=fixture.codec.artifact, ratio=4.0, fast=False
    )
    errors = fixture.codec.load(fixture.loads(CHUNK, blobs), CHUNK)
    assert errors == [None, None], errors
    worst = 0.0
    for store, blob in zip(fixture.stores(CHUNK), blobs, strict=True):
        wanted = reference.decode(blob, store.start, CHUNK)
        slots = block_slots(store.block_ids, fixture.block_size).to(device)
        for tensor, x in ((fixture.cache.k, wanted.k), (fixture.cache.v, wanted.v)):
            page, offset = slots // tensor.page_tokens, slots % tensor.page_tokens
            found = torch.stack([view[page, :, offset] for view in tensor.views], dim=1).cpu()
            worst = max(worst, float((found.float() - x.float()).abs().max() / x.abs().max()))
    assert worst < 0.01, worst
    return f"largest difference {worst:.1e} of the largest value"


def check_rope(device: torch.device) -> str:
    """Un-rotating and rotating bfloat16 keys changes almost none of them."""
    size = SHAPES["llama-3.1-8b"].head_size
    keys = (torch.randn(4, 2, 16, size) * 5).bfloat16().to(device)
    before = keys.clone()
    cache = PagedCache(PagedTensor.of([keys]), PagedTensor.of([keys.clone()]))
    rope = Rope(rope_table(size, 4096))
    table = RowTable.of(cache, [LayerPlace("k", 0, rope, 0)], 2 * size)
    slots = torch.arange(64, device=device)
    rows = torch.empty(64, 2 * size, device=device)
    gather_rows(table, slots, slots + 4000, None, rows)
    scatter_rows(table, slots, slots + 4000, None, rows)
    changed = int((keys != before).sum())
    assert changed <= 1e-3 * keys.numel(), changed
    return f"{changed} of {keys.numel()} elements changed"


def _streams() -> list[bytes]:
    drawn = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 256, (70000,), generator=drawn, dtype=torch.uint8)
    skewed = torch.randn(200000, generator=drawn).abs().mul(9).to(torch.uint8)
    return [noise.numpy().tobytes(), skewed.numpy().tobytes(), b"x", bytes(65536)]


def check_reads_isal(device: torch.device) -> str:
    """nvCOMP decodes isal's units."""
    NvcompDeflate()
    data = b"".join(_streams())
    section = DEFLATE.encode(_streams())
    assert NVCOMP.decode(section.units, memoryview(section.body), len(data)) == data
    return f"{len(section.units)} units"


def check_isal_reads(device: torch.device) -> str:
    """isal decodes nvCOMP's units."""
    NvcompDeflate()
    data = b"".join(_streams())
    section = NVCOMP.encode(_streams())
    assert DEFLATE.decode(section.units, memoryview(section.body), len(data)) == data
    return f"{len(data) / len(section.body):.3f}x, isal {len(data) / _isal_size():.3f}x"


def _isal_size() -> int:
    return len(DEFLATE.encode(_streams()).body)


def check_large(device: torch.device, codec: str = "kvtc") -> str:
    """The headline case once, without timing it."""
    fixture = PagedFixture("llama-3.1-8b", 8, 16.0, 8192, device, codec=codec)
    blobs = fixture.encode(128)
    errors = [e for e in fixture.codec.load(fixture.loads(128, blobs), 128) if e is not None]
    assert not errors, errors[0]
    ratio = fixture.raw_bytes / sum(map(len, blobs))
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    return f"real ratio {ratio:.2f}, peak {peak:.1f} GiB"


if __name__ == "__main__":
    main()
