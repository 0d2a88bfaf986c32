"""The stages of one encode and one decode of codec 2, timed one by one."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.gpu.paged_fixture import PagedFixture
from benchmarks.gpu.report import seconds
from kvtc_vllm.codec.container import parse
from kvtc_vllm.codec.kernels.chunks import RowLayout
from kvtc_vllm.codec.kernels.numeric import products
from kvtc_vllm.codec.kernels.paged import block_slots
from kvtc_vllm.codec.kernels.paged_io import scatter_rows
from kvtc_vllm.codec.kernels.payload_coding import StepPayloads
from kvtc_vllm.codec.kernels.unit_coders import unit_coder
from kvtc_vllm.codec.kernels.uploads import UploadedBlobs
from kvtc_vllm.codec.kernels.verified import VerifiedBlob
from kvtc_vllm.codec.streams import DeviceThread
from tests.codec.kernels.requests import Store


def step_stage_ms(fixture: PagedFixture, chunk_tokens: int, rounds: int) -> dict[str, float]:
    """Milliseconds of every stage over the whole load, with the device idle between stages.

    Products are those of all tokens. `quantise_pack` and `unpack_dequantise` are what is left of
    encoding and decoding payloads without them: also what marked tokens have beyond, and the host's
    part. The chunk with sinks is left out of what comes before the entropy coder.
    Stages overlap in the real pipeline, so their sum may exceed its time.
    """
    codec = fixture.codec
    device, coding, resident = codec.device, codec.coding, codec.resident
    stores = fixture.stores(chunk_tokens)
    blobs = fixture.encode(chunk_tokens)
    staged = codec.stage(stores)
    marks = codec.marks_of(staged)
    layout, rows = staged.layout, staged.rows
    coder = unit_coder(device)
    raw = coding.encode(layout, rows, marks)
    taken: dict[str, float] = {
        "gather": seconds(lambda: codec.stage(stores), device, rounds),
        "encode_payloads": seconds(lambda: coding.encode(layout, rows, marks), device, rounds),
        "deflate": seconds(
            lambda: coder.deflate(raw.data, raw.starts, raw.lengths), device, rounds
        ),
        "verify": seconds(lambda: [parse(blob) for blob in blobs], device, rounds),
    }
    taken |= _products(fixture, layout, rows, rounds)
    taken["quantise_pack"] = taken.pop("encode_payloads") - taken["encode_product"]

    # Without the first: all others are alike.
    views = [memoryview(blob) for blob in blobs[1:]]
    verified = {i: VerifiedBlob.of(view, parse(view)) for i, view in enumerate(views)}
    plain = RowLayout.of([chunk_tokens] * len(views))
    stored = [coding.stored(blob, chunk_tokens) for blob in verified.values()]
    plan = coding.plan(plain, stored)
    data = torch.empty(plan.nbytes, dtype=torch.uint8, device=device)
    thread = DeviceThread(device, 0)
    kept: list[object] = []

    def inflate() -> None:
        uploads = UploadedBlobs(views, thread, device, coder.reads_on_device)
        if coder.reads_on_device:
            for index in range(len(views)):
                uploads.stage(index)
            uploads.send(slice(0, len(views)))
        reader = coder.open(uploads, verified)
        reader.inflate(plan.placed, data)
        kept[:] = [reader]

    taken["upload_inflate"] = seconds(inflate, device, rounds)
    inflate()
    step = StepPayloads(
        plain,
        plain.table.to(device),
        torch.from_numpy(plan.numbers).to(device),
        data,
        torch.zeros(len(views), dtype=torch.int32, device=device),
        coding.memory(len(views), chunk_tokens, device),
        plan.marked,
    )
    size = coding.coefficients(plain.num_rows, plan.marked)
    room = torch.empty(size, dtype=resident.operand, device=device)
    shape = plain.num_rows + plan.marked, resident.row
    out = torch.empty(shape, dtype=codec.row_dtype, device=device)

    def decode() -> None:
        coding.decode(step, room, out)

    taken["unpack_dequantise"] = seconds(decode, device, rounds) - taken["decode_product"]
    assert not step.flags.any()
    taken["scatter"] = _scatter(fixture, stores, plain, out, coding.others(step), rounds)
    return {stage: round(value * 1e3, 4) for stage, value in taken.items()}


def _products(
    fixture: PagedFixture, layout: RowLayout, rows: torch.Tensor, rounds: int
) -> dict[str, float]:
    """rows: staged."""
    codec = fixture.codec
    device, resident = codec.device, codec.resident
    taken = {"encode_product": 0.0, "decode_product": 0.0}
    out = torch.empty(layout.num_rows, resident.row, dtype=codec.row_dtype, device=device)
    for batch in resident.batches:
        width, shape = batch.shape.width, (len(batch.keys), layout.num_rows, batch.shape.width)
        coefficients = torch.empty(shape, device=device)
        operand = torch.zeros(shape, dtype=resident.operand, device=device)
        basis, inverse = batch.analysis[:, :, :width], batch.synthesis.transpose(1, 2)[:, :width]
        taken["encode_product"] += seconds(
            lambda: products(batch.rows(rows), basis, coefficients),  # noqa: B023
            device,
            rounds,
        )
        taken["decode_product"] += seconds(
            lambda: products(operand, inverse, batch.rows(out)),  # noqa: B023
            device,
            rounds,
        )
    return taken


def _scatter(
    fixture: PagedFixture,
    stores: list[Store],
    layout: RowLayout,
    rows: torch.Tensor,
    others: torch.Tensor | None,
    rounds: int,
) -> float:
    codec = fixture.codec
    device, mean = codec.device, codec.resident.mean
    blocks = np.concatenate([np.array(store.block_ids) for store in stores[1:]])
    slots = block_slots(blocks.tolist(), fixture.block_size).to(device)
    positions = torch.arange(layout.num_rows, device=device)
    return seconds(
        lambda: scatter_rows(codec.rows, slots, positions, mean, rows, others=others),
        device,
        rounds,
    )
