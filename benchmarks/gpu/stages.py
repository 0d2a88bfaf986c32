"""The stages of one encode and one decode, timed one by one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.gpu.paged_fixture import PagedFixture
from benchmarks.gpu.report import seconds
from kvtc_vllm.codec.artifact import KINDS
from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.container import parse
from kvtc_vllm.codec.kernels.bit_payloads import BitPayloads
from kvtc_vllm.codec.kernels.chunks import RowLayout
from kvtc_vllm.codec.kernels.numeric import product
from kvtc_vllm.codec.kernels.paged import block_slots, within
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

    def add(stage: str, call: Callable[[], object]) -> None:
        ms[stage] = ms.get(stage, 0.0) + seconds(call, device, rounds)

    magnitudes = torch.zeros(chunks, dtype=torch.int32, device=device)
    flags = torch.zeros(tokens, dtype=torch.int32, device=device)
    for group, (first, end) in enumerate(resident.geometry.layer_groups):
        for kind in KINDS:
            tables = coding.tables(group, kind, layout.lengths)
            columns = resident.columns(group, kind)
            x = torch.zeros(tokens, columns.stop - columns.start, device=device)
            x = x.to(resident.operand)
            own = staged.rows[kind][:tokens, columns]
            x[: len(own)] = own
            coefficients = torch.empty(tokens, tables.width, device=device)
            basis, inverse = resident.analysis[group, kind], resident.synthesis[group, kind].T
            product(x, basis, coefficients)
            payloads = torch.empty(chunks, tables.payload_stride, dtype=torch.uint8, device=device)
            operand = torch.zeros(tokens, tables.width, dtype=basis.dtype, device=device)
            rows = torch.empty(tokens, x.shape[1], dtype=codec.row_dtype, device=device)
            overflowed = flags if codec.row_dtype == torch.float16 else None
            units = np.array(tables.unit_lengths[0] * chunks, np.int64)
            starts = np.concatenate(
                [
                    np.array(tables.unit_lengths[0], np.int64).cumsum()
                    - np.array(tables.unit_lengths[0], np.int64)
                    + place * tables.payload_stride
                    for place in range(chunks)
                ]
            )
            tensor = fixture.cache.tensor(kind)
            layers = within(resident.rotations[kind], first, end)

            # Called before the loop goes on.
            add("encode_product", lambda: product(x, basis, coefficients))  # noqa: B023
            add(
                "quantise_pack",
                lambda: encode_payloads(coefficients, tables, table, payloads, magnitudes),  # noqa: B023
            )
            add("deflate", lambda: coder.deflate(payloads.flatten(), starts, units))  # noqa: B023
            add(
                "unpack_dequantise",
                lambda: decode_payloads(payloads, tables, table, operand, magnitudes),  # noqa: B023
            )
            add("decode_product", lambda: product(operand, inverse, rows))  # noqa: B023
            add(
                "scatter",
                lambda: scatter_rows(
                    tensor,  # noqa: B023
                    slots,
                    positions,
                    layers,  # noqa: B023
                    resident.means[kind][columns],  # noqa: B023
                    rows,  # noqa: B023
                    first_layer=first,  # noqa: B023
                    overflowed=overflowed,  # noqa: B023
                ),
            )
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
