"""Verified blobs -> paged cache, step by step: rows of all layers are written by one launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kernels.chunks import RowLayout
from kvtc_vllm.codec.kernels.paged_io import scatter_rows
from kvtc_vllm.codec.kernels.payload_coding import PayloadCoding, PayloadPlan, StepPayloads
from kvtc_vllm.codec.kernels.row_table import RowTable
from kvtc_vllm.codec.kernels.unit_coders import UnitReader
from kvtc_vllm.codec.streams import Event, SideStream

_OVERFLOW = "a decoded row is outside the float16 range"


@dataclass(frozen=True)
class DecodeStep:
    """Chunks of a load that have been checked and are decoded together."""

    layout: RowLayout
    """Of the chunks' coded tokens."""
    table: torch.Tensor
    """`RowLayout.table` on the device."""
    slots: torch.Tensor
    """int64 [R] on the device, in the order of the rows; `SKIP` for unwanted tokens."""
    positions: torch.Tensor
    """int64 [R] on the device, in the same order."""
    numbers: torch.Tensor
    """`PayloadPlan.numbers` on the device."""


@dataclass(frozen=True)
class InflatedPayloads:
    """The payloads of a step, on their way.

    plan: where they go in uint8 `data`. ready: after which they are there.
    """

    plan: PayloadPlan
    data: torch.Tensor
    ready: Event


@dataclass(frozen=True)
class DecodeWorkspace:
    """All device memory of one load, taken before anything is launched."""

    payloads: tuple[torch.Tensor, torch.Tensor]
    """uint8, each for the payloads of all layer groups of the largest step."""
    coefficients: torch.Tensor
    """Operand dtype, see `PayloadCoding.coefficients`."""
    rows: torch.Tensor
    """float16 or float32, of all sections, see `PayloadCoding.decode`."""
    flags: torch.Tensor
    """int32, zero. Of every step one after the other: damaged payloads by chunk, rows out of range
    by row."""
    own: tuple[torch.Tensor, ...]
    """What the codec's kernels need beside."""

    @classmethod
    def of(
        cls,
        coding: PayloadCoding,
        row_dtype: torch.dtype,
        chunks: int,
        most_chunks: int,
        tokens: int,
        device: torch.device,
    ) -> DecodeWorkspace:
        """For a load of `chunks` chunks of `tokens` tokens, at most `most_chunks` in a step.

        Raises torch.OutOfMemoryError.
        """
        resident = coding.resident
        payload = coding.payload_room(most_chunks, tokens)
        most, marked = most_chunks * tokens, coding.marked_room(most_chunks, tokens)
        coefficients = coding.coefficients(most, marked)
        return cls(
            (
                torch.empty(payload, dtype=torch.uint8, device=device),
                torch.empty(payload, dtype=torch.uint8, device=device),
            ),
            torch.empty(coefficients, dtype=resident.operand, device=device),
            torch.empty((most + marked) * resident.row, dtype=row_dtype, device=device),
            torch.zeros(chunks * (1 + tokens), dtype=torch.int32, device=device),
            coding.memory(most_chunks, tokens, device),
        )


def chunks_that_fit(coding: PayloadCoding, row_dtype: torch.dtype, tokens: int, free: int) -> int:
    """Chunks of a step for which a workspace takes at most `free` bytes; none may do."""
    resident = coding.resident

    def taken(coded: int, marked: int) -> int:
        rows = (coded + marked) * resident.row * row_dtype.itemsize
        return rows + coding.coefficients(coded, marked) * resident.operand.itemsize

    # Marked tokens find room for one chunk of nothing else, or for what a rule allows in all.
    free -= taken(0, coding.marked_room(1, tokens))
    each = coding.memory_bytes(tokens) + taken(tokens, coding.usual_marked(tokens))
    usual, most = coding.chunk_room(tokens)
    return min(free // (each + 2 * usual), (free - 2 * most) // each)


class Decoder:
    """Decodes the steps of one load and writes the wanted tokens.

    Of each step `inflate`, and then `decode`: what the host prepares in between, the device need
    not wait for. While the current stream works on one step, `inflating` decodes the payloads of
    the next; two buffers go to and fro between them. The host does not wait until `damaged`. table:
    of the cache, with the layers where the resident artifact's rows have them. point: see
    `PagedKvtcCodec.load`. Whoever gives up in between must wait for `inflating`: its buffers go
    back to the current stream's memory.
    """

    def __init__(
        self,
        coding: PayloadCoding,
        table: RowTable,
        workspace: DecodeWorkspace,
        inflating: SideStream,
        point: Event | None,
    ) -> None:
        self._coding = coding
        self._table = table
        self._workspace = workspace
        self._inflating = inflating
        self._point = point
        self._begin = Event(coding.resident.device)
        self._free: list[Event | None] = [None, None]
        self._steps: list[DecodeStep] = []
        self._readers: list[UnitReader] = []
        self._flags = 0

    def inflate(
        self, plan: PayloadPlan, open_reader: Callable[[], UnitReader], sent: Event | None
    ) -> tuple[InflatedPayloads, dict[int, ContainerError]]:
        """Begin with the next step.

        open_reader: of its blobs. sent: after which these are on the device. Gives chunks with
        damaged sections, too. Their blocks are written with something all the same.
        """
        side = len(self._readers) % 2
        data = self._workspace.payloads[side][: plan.nbytes]
        with self._inflating.after(self._begin, sent, self._free[side]):
            reader = open_reader()
            damaged = reader.inflate(plan.placed, data)
            ready = Event(data.device)
        self._readers.append(reader)
        return InflatedPayloads(plan, data, ready), damaged

    def decode(self, step: DecodeStep, inflated: InflatedPayloads) -> None:
        """Go on with the step that `inflate` was called for last."""
        inflated.ready.wait()
        count = len(step.layout.members)
        flags = self._workspace.flags[self._flags : self._flags + count + step.layout.num_rows]
        self._flags += len(flags)
        payloads = StepPayloads(
            step.layout,
            step.table,
            step.numbers,
            inflated.data,
            flags[:count],
            self._workspace.own,
            inflated.plan.marked,
        )
        self._write(step, payloads, flags[count:])
        self._free[len(self._steps) % 2] = Event(step.slots.device)
        self._steps.append(step)

    def damaged(self) -> dict[int, ContainerError]:
        """Chunks whose units or values are not what they should be. Waits for the device."""
        found: dict[int, ContainerError] = {}
        flags = self._workspace.flags[: self._flags].cpu().numpy()
        first = 0
        for step, reader in zip(self._steps, self._readers, strict=True):
            layout = step.layout
            last = first + len(layout.members)
            wrong = flags[first:last]
            first, by_row = last + layout.num_rows, flags[last : last + layout.num_rows]
            overflowed = np.maximum.reduceat(by_row, layout.first_rows[:-1]) != 0
            for place in np.flatnonzero((wrong != 0) | overflowed).tolist():
                why = self._coding.failures.get(int(wrong[place]), _OVERFLOW)
                found[layout.members[place]] = ContainerError("bounds", why)
            found |= reader.damaged()
        return found

    def _write(self, step: DecodeStep, payloads: StepPayloads, overflowed: torch.Tensor) -> None:
        """Decode all sections. overflowed: int32, set for rows out of range."""
        resident, workspace = self._coding.resident, self._workspace
        count = step.layout.num_rows + payloads.marked
        rows = workspace.rows[: count * resident.row].view(count, resident.row)
        self._coding.decode(payloads, workspace.coefficients, rows)
        if self._point is not None:
            self._point.wait()
        scatter_rows(
            self._table,
            step.slots,
            step.positions,
            resident.mean,
            rows,
            overflowed if rows.dtype == torch.float16 else None,
            self._coding.others(payloads),
        )
