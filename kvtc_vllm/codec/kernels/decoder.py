"""Verified blobs -> paged cache, for batches of chunks, one layer group after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kvtc_vllm.codec.artifact import KINDS, Kind
from kvtc_vllm.codec.container import Section
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kernels.chunks import Run
from kvtc_vllm.codec.kernels.dequantize import decode_payloads
from kvtc_vllm.codec.kernels.lanes import Lane, Mark
from kvtc_vllm.codec.kernels.matmul import product
from kvtc_vllm.codec.kernels.paged import PagedCache
from kvtc_vllm.codec.kernels.resident import ResidentArtifact
from kvtc_vllm.codec.kernels.rotation import within
from kvtc_vllm.codec.kernels.scatter import scatter_rows
from kvtc_vllm.codec.kernels.unit_coders import UnitReader


@dataclass(frozen=True)
class DecodeBatch:
    """Chunks of one ratio, checked, whose workspace fits.

    sections[chunk][group, kind]: where the payload is. slots, positions: int64 [R] on the
    device, in the order of the runs' rows; `SKIP` for tokens that are not wanted.
    """

    ratio: float
    runs: tuple[Run, ...]
    sections: Sequence[Mapping[tuple[int, Kind], Section]]
    slots: torch.Tensor
    positions: torch.Tensor


def decode_batch(
    batch: DecodeBatch,
    reader: UnitReader,
    resident: ResidentArtifact,
    cache: PagedCache,
    inflating: Lane,
) -> tuple[dict[int, ContainerError], list[tuple[Run, torch.Tensor]]]:
    """Decode all layer groups and write the wanted tokens.

    While the current stream works on a layer group, `inflating` decodes the payloads of the
    next; two buffers go to and fro between them. Returns chunks with damaged sections, and for
    every run the flags of `decode_payloads`, int32 [chunks], valid when the work has run.
    Their blocks have then been written with something.
    """
    device = batch.slots.device
    flags = [torch.zeros(len(run.members), dtype=torch.int32, device=device) for run in batch.runs]
    size = max((_payload_bytes(batch, resident, group) for group in resident.groups), default=0)
    buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    begin = Mark(device)
    free: list[Mark | None] = [None, None]
    damaged: dict[int, ContainerError] = {}
    for group in resident.groups:
        buffer = buffers[group % 2]
        with inflating.after(begin, free[group % 2]):
            damaged |= _inflate_group(batch, reader, resident, group, buffer)
            ready = Mark(device)
        ready.wait()
        offset = 0
        for kind in KINDS:
            offset = _decode_section(batch, resident, cache, group, kind, buffer, offset, flags)
        free[group % 2] = Mark(device)
    return damaged, list(zip(batch.runs, flags, strict=True))


def workspace_bytes_per_token(resident: ResidentArtifact, ratio: float) -> int:
    """Device memory that decoding takes for each token of a batch."""
    largest = payload = 0
    for group in resident.groups:
        both = 0
        for kind in KINDS:
            section = resident.sections[group, kind]
            rank = section.plans[ratio].rank
            row = resident.geometry.row_size(group, kind) * torch.float32.itemsize
            largest = max(largest, row + rank * section.basis.itemsize)
            both += -(-section.plans[ratio].raw_length(8) // 8)
        payload = max(payload, both)
    return largest + 2 * payload


def _payload_bytes(batch: DecodeBatch, resident: ResidentArtifact, group: int) -> int:
    return sum(
        resident.tables(group, kind, batch.ratio, run.tokens).payload_bytes * len(run.members)
        for kind in KINDS
        for run in batch.runs
    )


def _inflate_group(
    batch: DecodeBatch,
    reader: UnitReader,
    resident: ResidentArtifact,
    group: int,
    buffer: torch.Tensor,
) -> dict[int, ContainerError]:
    wanted = [
        (index, batch.sections[index][group, kind])
        for kind in KINDS
        for run in batch.runs
        for index in run.members
    ]
    return reader.inflate(wanted, buffer[: _payload_bytes(batch, resident, group)])


def _decode_section(
    batch: DecodeBatch,
    resident: ResidentArtifact,
    cache: PagedCache,
    group: int,
    kind: Kind,
    buffer: torch.Tensor,
    offset: int,
    flags: Sequence[torch.Tensor],
) -> int:
    """Decode K or V of a layer group; returns where the next section's payloads begin."""
    section = resident.sections[group, kind]
    rank = section.plans[batch.ratio].rank
    coefficients = torch.empty(
        (len(batch.slots), rank), dtype=section.basis.dtype, device=buffer.device
    )
    for run, damaged in zip(batch.runs, flags, strict=True):
        tables = resident.tables(group, kind, batch.ratio, run.tokens)
        end = offset + tables.payload_bytes * len(run.members)
        payloads = buffer[offset:end].view(len(run.members), tables.payload_bytes)
        decode_payloads(payloads, tables, coefficients[run.rows], damaged)
        offset = end
    rows = product(coefficients, resident.synthesis[group, kind][:, :rank].T)
    first, end_layer = resident.geometry.layer_groups[group]
    scatter_rows(
        cache.k if kind == "k" else cache.v,
        batch.slots,
        batch.positions,
        within(resident.rotations[kind], first, end_layer),
        section.mean,
        rows,
        first_layer=first,
    )
    return offset
