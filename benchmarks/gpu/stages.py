"""The stages of one encode and one decode, timed one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.paged_fixture import PagedFixture
from benchmarks.gpu.report import seconds
from kvtc_vllm.codec.artifact import KINDS
from kvtc_vllm.codec.container import parse
from kvtc_vllm.codec.kernels.chunks import batches_of, in_row_order
from kvtc_vllm.codec.kernels.numeric import product
from kvtc_vllm.codec.kernels.paged import block_slots, within
from kvtc_vllm.codec.kernels.paged_io import scatter_rows
from kvtc_vllm.codec.kernels.payload_kernels import decode_payloads, encode_payloads
from kvtc_vllm.codec.kernels.unit_coders import unit_coder


def stage_ms(fixture: PagedFixture, chunk_tokens: int, rounds: int) -> dict[str, float]:
    """Milliseconds of every stage over the whole load, with the device idle between stages.

    Chunks with sinks are timed as if they had none. Stages overlap in the real pipeline, so
    their sum may exceed its time.
    """
    codec = fixture.codec
    device, resident = codec.device, codec.resident
    stores = fixture.stores(chunk_tokens)
    chunks = len(stores)
    batches = batches_of([chunk_tokens] * chunks)
    slots = in_row_order(
        batches, lambda i: block_slots(stores[i].block_ids, fixture.block_size)
    ).to(device)
    positions = torch.arange(fixture.tokens, device=device)
    staged = codec.stage(stores)
    rows = {kind: x[: fixture.tokens] for kind, x in staged.rows.items()}
    blobs = fixture.encode(chunk_tokens)
    coder = unit_coder(device)
    ms = {
        "gather": seconds(lambda: codec.stage(stores), device, rounds),
        "verify": seconds(lambda: [parse(blob) for blob in blobs], device, rounds),
    }

    def add(stage: str, call: Callable[[], object]) -> None:
        ms[stage] = ms.get(stage, 0.0) + seconds(call, device, rounds)

    for group, (first, end) in enumerate(resident.geometry.layer_groups):
        for kind in KINDS:
            section = resident.sections[group, kind]
            tables = resident.tables(group, kind, codec.ratio, chunk_tokens)
            basis = section.basis[:, : tables.rank]
            x = torch.zeros(fixture.tokens, len(section.mean), dtype=basis.dtype, device=device)
            own = rows[kind][:, resident.columns(group, kind)]
            x[: len(own)] = own
            coefficients = product(x, basis)
            payloads = torch.empty(chunks, tables.payload_bytes, dtype=torch.uint8, device=device)
            operand = torch.empty(fixture.tokens, tables.rank, dtype=basis.dtype, device=device)
            damaged = torch.zeros(chunks, dtype=torch.int32, device=device)
            restored = product(operand.zero_(), basis.T)
            tensor = fixture.cache.tensor(kind)
            layers = within(resident.rotations[kind], first, end)

            # Called before the loop goes on.
            add("encode_product", lambda: product(x, basis))  # noqa: B023
            add("quantise_pack", lambda: encode_payloads(coefficients, tables, payloads))  # noqa: B023
            lengths = list(tables.unit_lengths) * chunks
            add("deflate", lambda: coder.deflate(payloads.flatten(), lengths))  # noqa: B023
            add(
                "unpack_dequantise",
                lambda: decode_payloads(payloads, tables, operand, damaged),  # noqa: B023
            )
            add("decode_product", lambda: product(operand, basis.T))  # noqa: B023
            add(
                "scatter",
                lambda: scatter_rows(
                    tensor,  # noqa: B023
                    slots,
                    positions,
                    layers,  # noqa: B023
                    section.mean,  # noqa: B023
                    restored,  # noqa: B023
                    first_layer=first,  # noqa: B023
                ),
            )
    ms["upload_inflate"] = _inflate_seconds(fixture, blobs, rounds)
    return {stage: round(value * 1e3, 4) for stage, value in ms.items()}


def product_flops(fixture: PagedFixture) -> int:
    """Floating-point operations of the matrix products of one direction."""
    return sum(
        2 * fixture.tokens * section.basis.shape[0] * section.basis.shape[1]
        for section in fixture.codec.resident.sections.values()
    )


def _inflate_seconds(fixture: PagedFixture, blobs: list[bytes], rounds: int) -> float:
    device = fixture.codec.device
    infos = [parse(blob) for blob in blobs]
    coder = unit_coder(device)
    coded = [
        (index, section)
        for index, info in enumerate(infos)
        for section in info.sections
        if section.kind <= 1
    ]
    out = torch.empty(
        sum(section.raw_length for _, section in coded), dtype=torch.uint8, device=device
    )
    kept: list[object] = []

    def run() -> None:
        reader = coder.open([memoryview(blob) for blob in blobs])
        reader.inflate(coded, out)
        kept[:] = [reader]

    return seconds(run, device, rounds)
