"""Verified blobs -> paged cache, for batches of chunks, one layer group after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kvtc_vllm.codec.artifact import KINDS, Kind
from kvtc_vllm.codec.container import Section
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kernels.chunks import RowLayout
from kvtc_vllm.codec.kernels.numeric import product
from kvtc_vllm.codec.kernels.paged import PagedCache, within
from kvtc_vllm.codec.kernels.paged_io import scatter_rows
from kvtc_vllm.codec.kernels.payload_kernels import decode_payloads
from kvtc_vllm.codec.kernels.resident import ResidentArtifact
from kvtc_vllm.codec.kernels.unit_coders import PlacedSection, UnitReader
from kvtc_vllm.codec.streams import Event, SideStream, upload

_NOT_FINITE = "a decoded coefficient is not finite"
_OVERFLOW = "a decoded row is outside the float16 range"


@dataclass(frozen=True)
class DecodeStep:
    """Chunks that have been checked and whose workspace fits."""

    layout: RowLayout
    """Of the chunks' coded tokens."""
    sections: Sequence[Mapping[tuple[int, Kind], tuple[int, Section]]]
    """Of each chunk, by layer group and tensor: number of the section, and where it is."""
    slots: torch.Tensor
    """int64 [R] on the device, in the order of the rows; `SKIP` for unwanted tokens."""
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
    """float16 or float32, for the widest section."""
    chunks: torch.Tensor
    """`RowLayout.table`."""
    flags: torch.Tensor
    """int32 [chunks + R], zero: values that are not finite by chunk, rows out of range by row."""

    @classmethod
    def of(
        cls, step: DecodeStep, resident: ResidentArtifact, row_dtype: torch.dtype
    ) -> DecodeWorkspace:
        """Raises torch.OutOfMemoryError."""
        device, layout = step.slots.device, step.layout
        tokens = layout.num_rows
        keys = list(resident.plans)
        groups = resident.layer_groups
        size = max((_payload_bytes(layout, resident, group) for group in groups), default=0)
        row = max(resident.geometry.row_size(*key) for key in keys)
        return cls(
            (
                torch.empty(size, dtype=torch.uint8, device=device),
                torch.empty(size, dtype=torch.uint8, device=device),
            ),
            torch.empty(
                tokens * max(resident.width(*key) for key in keys),
                dtype=resident.operand,
                device=device,
            ),
            torch.empty(tokens * row, dtype=row_dtype, device=device),
            upload(layout.table, device),
            torch.zeros(len(layout.members) + tokens, dtype=torch.int32, device=device),
        )


def workspace_bytes_per_token(resident: ResidentArtifact, row_dtype: torch.dtype) -> int:
    """Device memory that decoding takes for each token of a step, compressed bytes included."""
    widest = row = both = total = 0
    for group in resident.layer_groups:
        payload = 0
        for tensor in KINDS:
            widest = max(widest, resident.width(group, tensor))
            row = max(row, resident.geometry.row_size(group, tensor))
            payload += -(-resident.plans[group, tensor].raw_length(8) // 8)
        both = max(both, payload)
        total += payload
    return row * row_dtype.itemsize + widest * resident.operand.itemsize + 2 * both + total


def decode_step(
    step: DecodeStep,
    reader: UnitReader,
    resident: ResidentArtifact,
    cache: PagedCache,
    workspace: DecodeWorkspace,
    inflating: SideStream,
    point: Event | None,
) -> dict[int, ContainerError]:
    """Decode all layer groups and write the wanted tokens.

    While the current stream works on a layer group, `inflating` decodes the payloads of the
    next; two buffers go to and fro between them. point: see `PagedKvtcCodec.load`. Returns
    chunks with damaged sections; others are told by `damaged_chunks` when the work has run. The
    blocks of both have then been written with something. If it raises, nothing runs on
    `inflating` any more.
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
    return damaged


def damaged_chunks(step: DecodeStep, workspace: DecodeWorkspace) -> dict[int, ContainerError]:
    """Chunks whose values are no numbers. Waits for the device."""
    layout = step.layout
    flags = workspace.flags.cpu()
    damaged: dict[int, ContainerError] = {}
    count = len(layout.members)
    overflowed = flags[count:]
    for place, index in enumerate(layout.members):
        rows = slice(layout.first_rows[place], layout.first_rows[place + 1])
        if flags[place]:
            damaged[index] = ContainerError("bounds", _NOT_FINITE)
        elif bool(overflowed[rows].any()):
            damaged[index] = ContainerError("bounds", _OVERFLOW)
    return damaged


def _payload_bytes(layout: RowLayout, resident: ResidentArtifact, layer_group: int) -> int:
    if not layout.members:
        return 0
    stride = sum(
        resident.tables(layer_group, tensor, layout.lengths).payload_stride for tensor in KINDS
    )
    return stride * len(layout.members)


def _inflate_group(
    step: DecodeStep,
    reader: UnitReader,
    resident: ResidentArtifact,
    layer_group: int,
    buffer: torch.Tensor,
) -> dict[int, ContainerError]:
    wanted: list[PlacedSection] = []
    place = 0
    for tensor in KINDS:
        stride = resident.tables(layer_group, tensor, step.layout.lengths).payload_stride
        for index in step.layout.members:
            number, section = step.sections[index][layer_group, tensor]
            wanted.append(PlacedSection(index, number, section, place))
            place += stride
    return reader.inflate(wanted, buffer[:place])


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
    layout = step.layout
    tokens, chunks = layout.num_rows, len(layout.members)
    tables = resident.tables(layer_group, tensor, layout.lengths)
    end = offset + tables.payload_stride * chunks
    buffer = workspace.payloads[layer_group % 2]
    payloads = buffer[offset:end].view(chunks, tables.payload_stride)
    coefficients = workspace.coefficients[: tokens * tables.width].view(tokens, tables.width)
    decode_payloads(payloads, tables, workspace.chunks, coefficients, workspace.flags)
    row = resident.geometry.row_size(layer_group, tensor)
    rows = workspace.rows[: tokens * row].view(tokens, row)
    product(coefficients, resident.synthesis[layer_group, tensor].T, rows)
    if point is not None:
        point.wait()
    first, end_layer = resident.geometry.layer_groups[layer_group]
    scatter_rows(
        cache.tensor(tensor),
        step.slots,
        step.positions,
        within(resident.rotations[tensor], first, end_layer),
        resident.means[tensor][resident.columns(layer_group, tensor)],
        rows,
        first_layer=first,
        overflowed=workspace.flags[chunks:] if rows.dtype == torch.float16 else None,
    )
    return end
