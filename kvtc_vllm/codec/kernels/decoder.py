"""Verified blobs -> paged cache, for batches of chunks, one layer group after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kvtc_vllm.codec.artifact import KINDS, Kind
from kvtc_vllm.codec.container import Section
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kernels.chunks import Batch
from kvtc_vllm.codec.kernels.numeric import product
from kvtc_vllm.codec.kernels.paged import PagedCache, within
from kvtc_vllm.codec.kernels.paged_io import scatter_rows
from kvtc_vllm.codec.kernels.payload_kernels import decode_payloads
from kvtc_vllm.codec.kernels.resident import ResidentArtifact
from kvtc_vllm.codec.kernels.unit_coders import UnitReader
from kvtc_vllm.codec.streams import Event, SideStream


@dataclass(frozen=True)
class DecodeStep:
    """Chunks of one ratio, checked, whose workspace fits."""

    ratio: float
    """Target ratio that all were written at."""
    batches: tuple[Batch, ...]
    """Of the chunks' coded tokens."""
    sections: Sequence[Mapping[tuple[int, Kind], Section]]
    """Of each chunk, by layer group and tensor: where the payload is."""
    slots: torch.Tensor
    """int64 [R] on the device, in the order of the batches' rows; `SKIP` for unwanted tokens."""
    positions: torch.Tensor
    """int64 [R] on the device, in the same order."""


@dataclass(frozen=True)
class DecodeWorkspace:
    """All device memory of one step, taken before anything is launched."""

    payloads: tuple[torch.Tensor, torch.Tensor]
    """uint8, each for the payloads of the largest layer group."""
    coefficients: torch.Tensor
    """Operand dtype, for the widest section."""
    rows: torch.Tensor
    """float32, for the widest section."""
    flags: list[torch.Tensor]
    """int32 [chunks] of every batch, zero."""

    @classmethod
    def of(cls, step: DecodeStep, resident: ResidentArtifact) -> DecodeWorkspace:
        """Raises torch.OutOfMemoryError."""
        device = step.slots.device
        sections = resident.sections.values()
        size = max(_payload_bytes(step, resident, group) for group in resident.layer_groups)
        rank = max(section.plans[step.ratio].rank for section in sections)
        operand = next(iter(sections)).basis.dtype
        row = max(len(section.mean) for section in sections)
        return cls(
            (
                torch.empty(size, dtype=torch.uint8, device=device),
                torch.empty(size, dtype=torch.uint8, device=device),
            ),
            torch.empty(len(step.slots) * rank, dtype=operand, device=device),
            torch.empty(len(step.slots) * row, device=device),
            [
                torch.zeros(len(batch.members), dtype=torch.int32, device=device)
                for batch in step.batches
            ],
        )


def decode_step(
    step: DecodeStep,
    reader: UnitReader,
    resident: ResidentArtifact,
    cache: PagedCache,
    workspace: DecodeWorkspace,
    inflating: SideStream,
    point: Event | None,
) -> tuple[dict[int, ContainerError], list[tuple[Batch, torch.Tensor]]]:
    """Decode all layer groups and write the wanted tokens.

    While the current stream works on a layer group, `inflating` decodes the payloads of the
    next; two buffers go to and fro between them. point: see `PagedKvtcCodec.load`. Returns
    chunks with damaged sections, and for every batch the flags of `decode_payloads`, int32
    [chunks], valid when the work has run. The blocks of damaged chunks have then been written
    with something. If it raises, nothing runs on `inflating` any more.
    """
    device = step.slots.device
    begin = Event(device)
    free: list[Event | None] = [None, None]
    damaged: dict[int, ContainerError] = {}
    try:
        for layer_group in resident.layer_groups:
            buffer = workspace.payloads[layer_group % 2]
            with inflating.after(begin, free[layer_group % 2]):
                damaged |= _inflate_group(step, reader, resident, layer_group, buffer)
                ready = Event(device)
            ready.wait()
            offset = 0
            for tensor in KINDS:
                offset = _decode_section(
                    step, resident, cache, layer_group, tensor, workspace, offset, point
                )
            free[layer_group % 2] = Event(device)
    except BaseException:
        # Its buffers go back to the current stream's memory.
        inflating.synchronize()
        raise
    return damaged, list(zip(step.batches, workspace.flags, strict=True))


def workspace_bytes_per_token(resident: ResidentArtifact, ratio: float) -> int:
    """Device memory that decoding takes for each token of a batch."""
    largest = payload = 0
    for layer_group in resident.layer_groups:
        both = 0
        for tensor in KINDS:
            section = resident.sections[layer_group, tensor]
            rank = section.plans[ratio].rank
            row = resident.geometry.row_size(layer_group, tensor) * torch.float32.itemsize
            largest = max(largest, row + rank * section.basis.itemsize)
            both += -(-section.plans[ratio].raw_length(8) // 8)
        payload = max(payload, both)
    return largest + 2 * payload


def _payload_bytes(step: DecodeStep, resident: ResidentArtifact, layer_group: int) -> int:
    return sum(
        resident.tables(layer_group, tensor, step.ratio, batch.tokens).payload_bytes
        * len(batch.members)
        for tensor in KINDS
        for batch in step.batches
    )


def _inflate_group(
    step: DecodeStep,
    reader: UnitReader,
    resident: ResidentArtifact,
    layer_group: int,
    buffer: torch.Tensor,
) -> dict[int, ContainerError]:
    wanted = [
        (index, step.sections[index][layer_group, tensor])
        for tensor in KINDS
        for batch in step.batches
        for index in batch.members
    ]
    return reader.inflate(wanted, buffer[: _payload_bytes(step, resident, layer_group)])


def _decode_section(
    step: DecodeStep,
    resident: ResidentArtifact,
    cache: PagedCache,
    layer_group: int,
    tensor: Kind,
    workspace: DecodeWorkspace,
    offset: int,
    point: Event | None,
) -> int:
    """Decode K or V of a layer group; returns where the next section's payloads begin."""
    section = resident.sections[layer_group, tensor]
    rank, tokens = section.plans[step.ratio].rank, len(step.slots)
    buffer = workspace.payloads[layer_group % 2]
    coefficients = workspace.coefficients[: tokens * rank].view(tokens, rank)
    for batch, damaged in zip(step.batches, workspace.flags, strict=True):
        tables = resident.tables(layer_group, tensor, step.ratio, batch.tokens)
        end = offset + tables.payload_bytes * len(batch.members)
        payloads = buffer[offset:end].view(len(batch.members), tables.payload_bytes)
        decode_payloads(payloads, tables, coefficients[batch.rows], damaged)
        offset = end
    row = len(section.mean)
    rows = workspace.rows[: tokens * row].view(tokens, row)
    product(coefficients, resident.synthesis[layer_group, tensor][:, :rank].T, rows)
    if point is not None:
        point.wait()
    first, end_layer = resident.geometry.layer_groups[layer_group]
    scatter_rows(
        cache.tensor(tensor),
        step.slots,
        step.positions,
        within(resident.rotations[tensor], first, end_layer),
        section.mean,
        rows,
        first_layer=first,
    )
    return offset
