"""Staged rows -> coded units, for batches of chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvtc_vllm.codec.artifact import Kind
from kvtc_vllm.codec.container import section_rows
from kvtc_vllm.codec.entropy import DEFLATE, UNIT_BYTES, UnitList, aligned
from kvtc_vllm.codec.entropy.unit_table import Lengths
from kvtc_vllm.codec.frame import SECTION_KIND
from kvtc_vllm.codec.kernels.chunks import RowLayout, StoreChunk, steps
from kvtc_vllm.codec.kernels.numeric import product
from kvtc_vllm.codec.kernels.payload_kernels import encode_payloads
from kvtc_vllm.codec.kernels.resident import PlanTables, ResidentArtifact
from kvtc_vllm.codec.kernels.unit_coders import CodedUnits, UnitCoder
from kvtc_vllm.codec.streams import upload

_DEFLATE_SCRATCH = 4
"""Bytes for each byte of a payload while it is coded: itself, room for the worst unit, what was
made of it."""


@dataclass(frozen=True)
class StagedChunks:
    """Chunks read out of the paged cache; their blocks may be overwritten now."""

    chunks: tuple[StoreChunk, ...]
    tokens: tuple[int, ...]
    """Of each chunk."""
    sinks: tuple[int, ...]
    """Exact leading tokens of each chunk."""
    layout: RowLayout
    """Of the chunks' coded tokens."""
    rows: dict[Kind, torch.Tensor]
    """K and V [R, P] of all layers, pre-RoPE and without mean, in the operand dtype."""
    sink_rows: dict[Kind, torch.Tensor]
    """K and V float32 [sum of sinks, P] as they are in the cache."""
    refused: dict[int, str]
    """Number of each chunk that cannot be coded -> why."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the allocator must be told about when another stream encodes."""
        return [*self.rows.values(), *self.sink_rows.values()]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)


@dataclass(frozen=True)
class EncodedStep:
    """Some of the staged chunks, coded; bodies still where they were coded."""

    members: tuple[int, ...]
    """The chunks' numbers."""
    magnitudes: tuple[float, ...]
    """Largest absolute coefficient of each; NaN or inf if one is not finite."""
    section_rows: list[bytes]
    """Of each chunk, as the container's section table has them."""
    unit_tables: list[bytes]
    """Of each chunk, as the container has them."""
    ends: list[int]
    """Where each chunk's padded units end in `body`."""
    body: torch.Tensor
    """uint8, units of chunk after chunk, each padded with zeros, on the coder's device."""


def workspace_bytes_per_token(resident: ResidentArtifact) -> int:
    """Device memory that encoding takes for each token of a step."""
    widest = max(resident.width(*key) for key in resident.plans)
    payload = sum(-(-plan.raw_length(8) // 8) for plan in resident.plans.values())
    return widest * torch.float32.itemsize + _DEFLATE_SCRATCH * payload


def encode_rows(
    staged: StagedChunks, resident: ResidentArtifact, coder: UnitCoder, workspace_bytes: int
) -> Iterator[EncodedStep]:
    """Encode the coded part of every chunk that has one, some at a time.

    What a step yields must be done with before the next. Waits for the device. workspace_bytes:
    limit of one step; a single chunk may exceed it.
    """
    per_token = workspace_bytes_per_token(resident)
    layout = staged.layout
    for places in steps([per_token * tokens for tokens in layout.tokens], workspace_bytes):
        first = layout.first_rows[places.start]
        part = layout.part(places)
        rows = {tensor: x[first : first + part.num_rows] for tensor, x in staged.rows.items()}
        yield _encode_step(part, rows, resident, coder)


def _encode_step(
    layout: RowLayout,
    rows: dict[Kind, torch.Tensor],
    resident: ResidentArtifact,
    coder: UnitCoder,
) -> EncodedStep:
    device = next(iter(rows.values())).device
    chunks, lengths = len(layout.members), layout.lengths
    keys = resident.keys
    tables = [resident.tables(*key, lengths) for key in keys]
    strides = np.array([t.payload_stride for t in tables], np.int64)
    ends = (strides * chunks).cumsum()
    payloads = torch.empty(int(ends[-1]), dtype=torch.uint8, device=device)
    room = torch.empty(layout.num_rows * max(t.width for t in tables), device=device)
    magnitudes = torch.zeros(chunks, dtype=torch.int32, device=device)
    table = upload(layout.table, device)
    for key, plan, end in zip(keys, tables, ends.tolist(), strict=True):
        x = rows[key[1]][:, resident.columns(*key)]
        if plan.width == 0:
            _note_magnitudes(x, layout, magnitudes)
            continue
        coefficients = room[: len(x) * plan.width].view(len(x), plan.width)
        product(x, resident.analysis[key], coefficients)
        out = payloads[end - plan.payload_stride * chunks : end].view(chunks, plan.payload_stride)
        encode_payloads(coefficients, plan, table, out, magnitudes)
    starts, raw, counts = _units(layout, tables, ends - strides * chunks, strides)
    coded = coder.deflate(payloads, starts, raw)
    largest = magnitudes.cpu().view(torch.float32).tolist()
    return _in_chunk_order(layout, raw, counts, coded, largest, keys)


def _note_magnitudes(x: torch.Tensor, layout: RowLayout, magnitudes: torch.Tensor) -> None:
    """Rows that nothing is stored of must be finite, too."""
    for place in range(len(layout.members)):
        part = x[layout.first_rows[place] : layout.first_rows[place + 1]]
        bits = part.abs().float().view(torch.int32).max()
        magnitudes[place] = torch.maximum(magnitudes[place], bits)


def _units(
    layout: RowLayout, tables: Sequence[PlanTables], first: Lengths, strides: Lengths
) -> tuple[Lengths, Lengths, list[tuple[int, ...]]]:
    """Where the units of all chunks begin, their raw lengths, and how many every section has.

    Chunk after chunk, and inside it section after section. first: where each section's payloads
    begin. strides: from one chunk's to the next.
    """
    by_length = []
    for which in range(len(layout.lengths)):
        sizes = [np.array(t.unit_lengths[which], np.int64) for t in tables]
        offsets = [size.cumsum() - size + start for size, start in zip(sizes, first, strict=True)]
        by_length.append(
            (
                np.concatenate(offsets),
                np.repeat(strides, [len(size) for size in sizes]),
                np.concatenate(sizes),
                tuple(len(size) for size in sizes),
            )
        )
    own = [by_length[layout.lengths.index(tokens)] for tokens in layout.tokens]
    starts = [first + place * step for place, (first, step, _, _) in enumerate(own)]
    raw = [sizes for _, _, sizes, _ in own]
    return np.concatenate(starts), np.concatenate(raw), [counts for *_, counts in own]


def _in_chunk_order(
    layout: RowLayout,
    raw: Lengths,
    counts: list[tuple[int, ...]],
    coded: CodedUnits,
    largest: Sequence[float],
    keys: Sequence[tuple[int, Kind]],
) -> EncodedStep:
    """keys: of the sections of a chunk, in the container's order."""
    padded = aligned(coded.stored)
    padded_ends = padded.cumsum()
    per_section = np.array([count for own in counts for count in own], np.int64)
    last = per_section.cumsum()
    sums = np.concatenate((np.zeros((1, 2), np.int64), np.stack((raw, padded), 1))).cumsum(0)
    sizes = np.column_stack((per_section, sums[last] - sums[last - per_section]))
    rows = section_rows(
        [SECTION_KIND[tensor] for _, tensor in keys],
        [group for group, _ in keys],
        DEFLATE.coder_id,
        sizes.reshape(len(counts), len(keys), 3),
    )
    table = UnitList.of(np.stack((raw, coded.stored), axis=1)).table
    unit_tables: list[bytes] = []
    ends: list[int] = []
    unit = 0
    for own in counts:
        units = sum(own)
        unit_tables.append(bytes(table[unit * UNIT_BYTES : (unit + units) * UNIT_BYTES]))
        unit += units
        ends.append(int(padded_ends[unit - 1]) if unit else 0)
    body = coded.collect(padded_ends - padded, ends[-1])
    return EncodedStep(layout.members, tuple(largest), rows, unit_tables, ends, body)
