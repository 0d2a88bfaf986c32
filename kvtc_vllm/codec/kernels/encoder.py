"""Staged rows -> coded units, for batches of chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvtc_vllm.codec.container import SectionKind, section_rows
from kvtc_vllm.codec.entropy import UNIT_BYTES, UnitList, aligned
from kvtc_vllm.codec.entropy.unit_table import Lengths
from kvtc_vllm.codec.kernels.chunks import RowLayout, StoreChunk, even_steps
from kvtc_vllm.codec.kernels.payload_coding import Marks, PayloadCoding, RawPayloads
from kvtc_vllm.codec.kernels.unit_coders import CodedUnits, UnitCoder


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
    rows: torch.Tensor
    """[R, P] of all sections, pre-RoPE and without mean, in the operand dtype."""
    sink_rows: torch.Tensor
    """float32 [sum of sinks, P] as they are in the cache, K of all layers and then V."""
    squares: torch.Tensor | None
    """What the sink rule looks at, float32 [R, its layers]: sums of the squares of V, in the
    model's units. None if blobs do not say which tokens are marked."""
    refused: dict[int, str]
    """Number of each chunk that cannot be coded -> why."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the allocator must be told about when another stream encodes."""
        squares = [] if self.squares is None else [self.squares]
        return [self.rows, self.sink_rows, *squares]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)


@dataclass(frozen=True)
class EncodedStep:
    """Some of the staged chunks, coded; bodies still where they were coded."""

    members: tuple[int, ...]
    """The chunks' numbers."""
    magnitudes: tuple[float, ...]
    """Of each, see `RawPayloads.magnitudes`."""
    sizes: Lengths
    """Of each chunk's sections, int64 [chunks, sections, 3]: units, raw and stored bytes."""
    section_rows: list[bytes]
    """Of each chunk, as the container's section table has them."""
    unit_tables: list[bytes]
    """Of each chunk, as the container has them."""
    ends: list[int]
    """Where each chunk's padded units end in `body`."""
    body: torch.Tensor
    """uint8, units of chunk after chunk, each padded with zeros, on the coder's device."""


def encode_rows(
    staged: StagedChunks,
    marks: Mapping[int, Marks],
    coding: PayloadCoding,
    coder: UnitCoder,
    workspace_bytes: int,
    host_bytes: int,
) -> Iterator[EncodedStep]:
    """Encode the coded part of every chunk that has one, some at a time.

    What a step yields must be done with before the next. Waits for the device. marks: of each
    chunk, see `PayloadCoding.encode`. workspace_bytes, host_bytes: what payloads of one step take
    there at most; a single chunk may exceed it.
    """

    def cost(tokens: int) -> int:
        on_host = coding.stored_bytes(tokens) * workspace_bytes // host_bytes
        return max(coding.encode_bytes(tokens), on_host)

    layout = staged.layout
    costs = {tokens: cost(tokens) for tokens in layout.lengths}
    for places in even_steps([costs[tokens] for tokens in layout.tokens], workspace_bytes):
        first = layout.first_rows[places.start]
        part = layout.part(places)
        rows = staged.rows[first : first + part.num_rows]
        yield from _encode_step(part, rows, marks, coding, coder)


def _encode_step(
    layout: RowLayout,
    rows: torch.Tensor,
    marks: Mapping[int, Marks],
    coding: PayloadCoding,
    coder: UnitCoder,
) -> Iterator[EncodedStep]:
    raw = coding.encode(layout, rows, marks)
    if raw.layout.members:
        coded = coder.deflate(raw.data, raw.starts, raw.lengths)
        largest = raw.magnitudes.cpu().view(torch.float32).tolist()
        yield _in_chunk_order(raw, coded, largest, coding.sections)
    if raw.left_out:
        # Together: of many that are unlike the calibration data, a good part fits the next time.
        own = layout.chosen(raw.left_out)
        ends = layout.first_rows
        left = torch.cat([rows[ends[place] : ends[place + 1]] for place in raw.left_out])
        yield from _encode_step(own, left, marks, coding, coder)


def _in_chunk_order(
    payloads: RawPayloads,
    coded: CodedUnits,
    largest: Sequence[float],
    sections: Sequence[tuple[SectionKind, int]],
) -> EncodedStep:
    """sections: of a chunk, in the container's order."""
    raw = payloads.lengths
    padded = aligned(coded.stored)
    padded_ends = padded.cumsum()
    per_section = payloads.units.ravel()
    last = per_section.cumsum()
    sums = np.concatenate((np.zeros((1, 2), np.int64), np.stack((raw, padded), 1))).cumsum(0)
    sizes = np.column_stack((per_section, sums[last] - sums[last - per_section]))
    sizes = sizes.reshape(*payloads.units.shape, 3)
    rows = section_rows(
        [kind for kind, _ in sections],
        [group for _, group in sections],
        payloads.coder_ids,
        sizes,
    )
    table = UnitList.of(np.stack((raw, coded.stored), axis=1)).table
    unit_tables: list[bytes] = []
    ends: list[int] = []
    unit = 0
    for units in payloads.units.sum(1).tolist():
        unit_tables.append(bytes(table[unit * UNIT_BYTES : (unit + units) * UNIT_BYTES]))
        unit += units
        ends.append(int(padded_ends[unit - 1]) if unit else 0)
    body = coded.collect(padded_ends - padded, ends[-1])
    return EncodedStep(
        payloads.layout.members, tuple(largest), sizes, rows, unit_tables, ends, body
    )
