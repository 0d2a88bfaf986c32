"""The stages of one encode and one decode, timed one by one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.gpu.paged_fixture import PagedFixture
from benchmarks.gpu.report import seconds
from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.container import parse
from kvtc_vllm.codec.kernels.bit_payloads import BitPayloads
from kvtc_vllm.codec.kernels.chunks import RowLayout
from kvtc_vllm.codec.kernels.numeric import products
from kvtc_vllm.codec.kernels.paged import block_slots
from kvtc_vllm.codec.kernels.paged_io import scatter_rows
from kvtc_vllm.codec.kernels.payload_kernels import decode_payloads, encode_payloads
from kvtc_vllm.codec.kernels.unit_coders import PlacedSections, unit_coder
from kvtc_vllm.codec.kernels.uploads import UploadedBlobs
from kvtc_vllm.codec.kernels.verified import VerifiedBlob
from kvtc_vllm.codec.streams import DeviceThread


def stage_ms(fixture: PagedFixture, chunk_tokens: int, rounds: int) -> dict[str, float]:
    """Milliseconds of every stage over the whole load, with the device idle between stages.

    Chunks with sinks are timed as if they had none. Stages overlap in the real pipeline, so
    their sum may exceed its time.
    """
    codec = fixture.codec
    device, resident, coding = codec.device, codec.resident, codec.coding
    assert isinstance(coding, BitPayloads)
    stores = fixture.stores(chunk_tokens)
    layout = RowLayout.of([chunk_tokens] * len(stores))
    chunks, tokens = len(stores), layout.num_rows
    table = layout.table.to(device)
    slots = layout.in_row_order(lambda i: block_slots(stores[i].block_ids, fixture.block_size)).to(
        device
    )
    positions = torch.arange(tokens, device=device)
    staged = codec.stage(stores)
    blobs = fixture.encode(chunk_tokens)
    coder = unit_coder(device)
    ms = {
        "gather": seconds(lambda: codec.stage(stores), device, rounds),
        "verify": seconds(lambda: [parse(blob) for blob in blobs], device, rounds),
    }

    tables = coding.tables(layout.lengths)
    x = torch.zeros(tokens, resident.row, dtype=resident.operand, device=device)
    x[: len(staged.rows)] = staged.rows
    raw = coding.encode(layout, x, {})
    payloads = raw.data.view(chunks, tables.payload_stride)
    coefficients = torch.empty(tokens, tables.width, device=device)
    operand = torch.zeros(tokens, tables.width, dtype=resident.operand, device=device)
    rows = torch.empty(tokens, resident.row, dtype=codec.row_dtype, device=device)
    magnitudes = torch.zeros(chunks, dtype=torch.int32, device=device)
    flags = torch.zeros(tokens, dtype=torch.int32, device=device)
    overflowed = flags if codec.row_dtype == torch.float16 else None

    def project() -> None:
        for batch, part in coding.parts(coefficients):
            products(batch.rows(x), batch.analysis, part)

    def restore() -> None:
        for batch, part in coding.parts(operand):
            products(part, batch.synthesis.transpose(1, 2), batch.rows(rows))

    stages: dict[str, Callable[[], object]] = {
        "encode_product": project,
        "quantise_pack": lambda: encode_payloads(coefficients, tables, table, payloads, magnitudes),
        "deflate": lambda: coder.deflate(raw.data, raw.starts, raw.lengths),
        "unpack_dequantise": lambda: decode_payloads(payloads, tables, table, operand, magnitudes),
        "decode_product": restore,
        "scatter": lambda: scatter_rows(
            codec.rows, slots, positions, resident.mean, rows, overflowed
        ),
    }
    ms |= {stage: seconds(call, device, rounds) for stage, call in stages.items()}
    ms["upload_inflate"] = _inflate_seconds(fixture, blobs, rounds)
    return {stage: round(value * 1e3, 4) for stage, value in ms.items()}


def product_flops(fixture: PagedFixture) -> int:
    """Floating-point operations of the matrix products of one direction, marked tokens' apart."""
    resident = fixture.codec.resident
    return sum(
        2 * fixture.tokens * basis.shape[0] * resident.width(*key)
        for key, basis in resident.analysis.items()
    )


def _inflate_seconds(fixture: PagedFixture, blobs: list[Blob], rounds: int) -> float:
    device = fixture.codec.device
    coder = unit_coder(device)
    verified: dict[int, VerifiedBlob] = {}
    placed: list[tuple[int, int, int]] = []
    end = 0
    for index, blob in enumerate(blobs):
        info = parse(blob)
        verified[index] = VerifiedBlob.of(blob, info)
        for number, section in enumerate(info.sections):
            if section.kind <= 1:
                placed.append((index, number, end))
                end += section.raw_length
    out = torch.empty(end, dtype=torch.uint8, device=device)
    thread = DeviceThread(device, 0)
    wanted = PlacedSections(*np.array(placed, np.int64).T)
    kept: list[object] = []

    def run() -> None:
        views = [memoryview(blob) for blob in blobs]
        uploads = UploadedBlobs(views, thread, device, coder.reads_on_device)
        if coder.reads_on_device:
            for index in range(len(blobs)):
                uploads.stage(index)
            uploads.send(slice(0, len(blobs)))
        reader = coder.open(uploads, verified)
        reader.inflate(wanted, out)
        kept[:] = [reader]

    return seconds(run, device, rounds)
