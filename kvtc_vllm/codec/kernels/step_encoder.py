"""A step of a store under step plans: rows -> payloads cut into units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvtc_vllm.codec.entropy import DEFLATE, RAW
from kvtc_vllm.codec.entropy.unit_table import Lengths
from kvtc_vllm.codec.kernels.chunks import RowLayout
from kvtc_vllm.codec.kernels.numeric import products
from kvtc_vllm.codec.kernels.payload_coding import (
    Marks,
    RawPayloads,
    count_marked,
    row_magnitudes,
)
from kvtc_vllm.codec.kernels.resident import ResidentArtifact, padded_payload
from kvtc_vllm.codec.kernels.step_encoding import PLACE, PayloadPool, encode_sections
from kvtc_vllm.codec.kernels.step_tables import StepTables, bytes_per_column
from kvtc_vllm.codec.kernels.unit_cuts import cut_streams
from kvtc_vllm.codec.streams import upload
from kvtc_vllm.codec.v2.codes import MAX_ESCAPE_BYTES, WIDE_BYTES

_POOL_SHARE = 0.5
"""Bytes for the escapes of a step over those of its packed codes."""
_INFINITE = 0x7F800000
"""Bits of the least float32 that is not finite."""


@dataclass(frozen=True)
class _Sizes:
    """Of all payloads of a step, int64 [S, chunks]. packed: [S, chunks, widths], bytes of codes.

    most_escapes: bytes of what any one chunk may have.
    """

    tokens: Lengths
    first_rows: Lengths
    packed: Lengths
    begins: Lengths
    codes: int
    most_escapes: int

    @classmethod
    def of(cls, tables: StepTables, layout: RowLayout, marks: Sequence[Marks]) -> _Sizes:
        count = len(tables.sections)
        per_key = 1 if tables.all_coded else 2
        tokens = np.empty((count, len(layout.members)), np.int64)
        first_rows = np.empty_like(tokens)
        tokens[0::per_key], first_rows[0::per_key] = layout.tokens, layout.first_rows[:-1]
        if per_key == 2:
            tokens[1::2] = count_marked(marks)
            first_rows[1::2] = tokens[1].cumsum() - tokens[1]
        columns = tables.columns
        packed = bytes_per_column(tokens) * columns[:, None, :]
        padded = padded_payload(packed.sum(2))
        begins = (padded.ravel().cumsum() - padded.ravel()).reshape(padded.shape)
        most = MAX_ESCAPE_BYTES * (tokens * columns.sum(1)[:, None]).sum(0).max()
        return cls(tokens, first_rows, packed, begins, int(padded.sum()), int(most))

    @property
    def parts(self) -> Lengths:
        """What kernels read of every payload, see `encode_section`."""
        columns = (self.begins, np.zeros_like(self.begins), self.tokens, self.first_rows)
        return np.stack(columns, axis=2)


def count_coefficients(resident: ResidentArtifact, tokens: int, marked: int) -> int:
    """How many there are of so many coded tokens, of which so many are marked."""
    orders = resident.orders.values()
    beyond = sum(order.total_width - order.width for order in orders)
    return tokens * sum(order.width for order in orders) + marked * beyond


def encode_step(
    resident: ResidentArtifact,
    tables: StepTables,
    layout: RowLayout,
    rows: torch.Tensor,
    marks: Sequence[Marks],
) -> RawPayloads:
    """See `PayloadCoding.encode`. marks: of each chunk of the layout.

    A chunk whose escapes find no room in the pool is left out, unless it is the only one. Waits
    for the device.
    """
    device, chunks, num_rows = resident.device, len(layout.members), layout.num_rows
    sizes = _Sizes.of(tables, layout, marks)
    room = max(sizes.most_escapes, int(sizes.codes * _POOL_SHARE))
    data = torch.empty(sizes.codes + room, dtype=torch.uint8, device=device)
    marked = np.concatenate(marks)
    parts = sizes.parts.ravel()
    numbers = np.concatenate((parts, np.where(marked, marked.cumsum(), 0), np.flatnonzero(marked)))
    there = upload(torch.from_numpy(numbers), device)
    row_marks = None if tables.all_coded else there[len(parts) :][:num_rows]
    marked_rows = there[len(parts) + len(marked) :]
    magnitudes = torch.zeros(chunks, dtype=torch.int32, device=device)
    places = torch.zeros((len(tables.sections), chunks, PLACE), dtype=torch.int64, device=device)
    used = torch.zeros(1, dtype=torch.int64, device=device)
    counted = torch.empty((2, chunks, tables.num_columns), dtype=torch.int32, device=device)
    pool = PayloadPool(
        data[: sizes.codes],
        data[sizes.codes :],
        there[: len(parts)],
        chunks,
        (counted[0], counted[1]),
        places,
        used,
        magnitudes,
    )
    space = torch.empty(count_coefficients(resident, num_rows, len(marked_rows)), device=device)
    marked_x = rows.index_select(0, marked_rows) if len(marked_rows) else rows[:0]
    taken = [0, num_rows * tables.own_columns]

    def multiply(x: torch.Tensor, basis: torch.Tensor, sort: int) -> None:
        """sort: 0 for all coded tokens, 1 for what is beyond."""
        shape = *x.shape[:2], basis.shape[2]
        first, taken[sort] = taken[sort], taken[sort] + math.prod(shape)
        products(x, basis, space[first : taken[sort]].view(shape))

    for batch in resident.batches:
        width = batch.shape.width
        if width:
            multiply(batch.rows(rows), batch.analysis[:, :, :width], 0)
        else:
            bits = row_magnitudes(rows[:, batch.columns], layout)
            torch.maximum(magnitudes, bits * (bits >= _INFINITE), out=magnitudes)
        if len(marked_rows) and batch.shape.beyond:
            multiply(batch.rows(marked_x), batch.analysis[:, :, width:], 1)
    encode_sections(space, (num_rows, len(marked_rows)), tables, pool, row_marks)
    found = places.cpu().numpy().swapaxes(0, 1)
    return _cut(tables, layout, sizes, data, found, magnitudes.cpu())


def _cut(
    tables: StepTables,
    layout: RowLayout,
    sizes: _Sizes,
    data: torch.Tensor,
    found: Lengths,
    magnitudes: torch.Tensor,
) -> RawPayloads:
    """found: places of the escapes, [chunks, S, PLACE]."""
    escapes = found[..., 1:].copy()
    escapes[..., -1] *= WIDE_BYTES
    taken = escapes.sum(2)
    ends = np.where(taken > 0, sizes.codes + found[..., 0] + taken, 0)
    fits = (ends <= data.numel()).all(axis=1)
    kept, left_out = np.flatnonzero(fits), np.flatnonzero(~fits)
    packed = sizes.packed.swapaxes(0, 1)[kept]
    escapes = escapes[kept]
    begins = sizes.begins.T[kept]
    pooled = sizes.codes + found[kept, :, 0]
    lengths = np.concatenate((packed, escapes), axis=2)
    starts = np.concatenate(
        (
            begins[..., None] + packed.cumsum(2) - packed,
            pooled[..., None] + escapes.cumsum(2) - escapes,
        ),
        axis=2,
    )
    unit_starts, unit_lengths, units = cut_streams(starts.ravel(), lengths.ravel())
    # As the reference writes what no token has.
    empty = (sizes.tokens[:, kept].T == 0) | ~tables.has_plan
    coder_ids = np.where(empty, RAW.coder_id, DEFLATE.coder_id)
    end = int(ends[kept].max()) if len(kept) else 0
    return RawPayloads(
        layout.chosen(kept.tolist()),
        data[: max(end, sizes.codes)],
        unit_starts,
        unit_lengths,
        units.reshape(lengths.shape).sum(2),
        coder_ids,
        magnitudes[torch.from_numpy(kept)],
        tuple(left_out.tolist()),
    )
