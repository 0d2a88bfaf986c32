"""Verified blobs -> paged cache: step by step, and in a step one layer group after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kvtc_vllm.codec.artifact import SectionKey
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kernels.chunks import RowLayout
from kvtc_vllm.codec.kernels.paged import PagedCache, within
from kvtc_vllm.codec.kernels.paged_io import scatter_rows
from kvtc_vllm.codec.kernels.payload_coding import PayloadCoding, PayloadPlan, StepPayloads
from kvtc_vllm.codec.kernels.unit_coders import UnitReader
from kvtc_vllm.codec.streams import Event, SideStream

_OVERFLOW = "a decoded row is outside the float16 range"


@dataclass(frozen=True)
class DecodeStep:
    """Chunks of a load that have been checked and are decoded together."""

    layout: RowLayout
    """Of the chunks' coded tokens."""
    payloads: PayloadPlan
    """Where their payloads go."""
    table: torch.Tensor
    """`RowLayout.table` on the device."""
    slots: torch.Tensor
    """int64 [R] on the device, in the order of the rows; `SKIP` for unwanted tokens."""
    positions: torch.Tensor
    """int64 [R] on the device, in the same order."""
    numbers: torch.Tensor
    """`PayloadPlan.numbers` on the device."""


@dataclass(frozen=True)
class DecodeWorkspace:
    """All device memory of one load, taken before anything is launched."""

    payloads: tuple[torch.Tensor, torch.Tensor]
    """uint8, each for the payloads of all layer groups of the largest step."""
    coefficients: torch.Tensor
    """Operand dtype, see `PayloadCoding.coefficients`."""
    rows: torch.Tensor
    """float16 or float32, for the widest section."""
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
        most = most_chunks * tokens
        coefficients = coding.coefficients(most, coding.marked_room(most_chunks, tokens))
        return cls(
            (
                torch.empty(payload, dtype=torch.uint8, device=device),
                torch.empty(payload, dtype=torch.uint8, device=device),
            ),
            torch.empty(coefficients, dtype=resident.operand, device=device),
            torch.empty(most * resident.longest_row, dtype=row_dtype, device=device),
            torch.zeros(chunks * (1 + tokens), dtype=torch.int32, device=device),
            coding.memory(most_chunks, tokens, row_dtype, device),
        )


def chunks_that_fit(coding: PayloadCoding, row_dtype: torch.dtype, tokens: int, free: int) -> int:
    """Chunks of a step for which a workspace takes at most `free` bytes; none may do."""
    resident = coding.resident
    each = coding.memory_bytes(tokens, row_dtype)
    each += tokens * resident.longest_row * row_dtype.itemsize
    each += coding.coefficients(tokens, 0) * resident.operand.itemsize
    free -= coding.coefficients(0, coding.marked_room(1, tokens)) * resident.operand.itemsize
    usual, most = coding.chunk_room(tokens)
    return min(free // (each + 2 * usual), (free - 2 * most) // each)


class Decoder:
    """Decodes the steps of one load and writes the wanted tokens.

    While the current stream works on one step, `inflating` decodes the payloads of the next; two
    buffers go to and fro between them. The host does not wait until `damaged`. point: see
    `PagedKvtcCodec.load`. Whoever gives up in between must wait for `inflating`: its buffers go
    back to the current stream's memory.
    """

    def __init__(
        self,
        coding: PayloadCoding,
        cache: PagedCache,
        workspace: DecodeWorkspace,
        inflating: SideStream,
        point: Event | None,
    ) -> None:
        self._coding = coding
        self._cache = cache
        self._workspace = workspace
        self._inflating = inflating
        self._point = point
        self._begin = Event(cache.k.device)
        self._free: list[Event | None] = [None, None]
        self._steps: list[DecodeStep] = []
        self._readers: list[UnitReader] = []
        self._flags = 0

    def decode(
        self, step: DecodeStep, open_reader: Callable[[], UnitReader], sent: Event | None
    ) -> dict[int, ContainerError]:
        """Begin to decode the next step.

        open_reader: of its blobs. sent: after which these are on the device. Returns chunks with
        damaged sections. Their blocks are written with something all the same.
        """
        device = step.slots.device
        side = len(self._steps) % 2
        data = self._workspace.payloads[side][: step.payloads.nbytes]
        with self._inflating.after(self._begin, sent, self._free[side]):
            reader = open_reader()
            damaged = reader.inflate(step.payloads.placed, data)
            ready = Event(device)
        ready.wait()
        count = len(step.layout.members)
        flags = self._workspace.flags[self._flags : self._flags + count + step.layout.num_rows]
        self._flags += len(flags)
        payloads = StepPayloads(
            step.layout,
            step.table,
            step.numbers,
            data,
            flags[:count],
            self._workspace.own,
            step.payloads.marked,
        )
        self._coding.begin(payloads, self._workspace.coefficients)
        for section, key in enumerate(self._coding.resident.keys):
            self._decode_section(step, payloads, section, key, flags[count:])
        self._free[side] = Event(device)
        self._steps.append(step)
        self._readers.append(reader)
        return damaged

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

    def _decode_section(
        self,
        step: DecodeStep,
        payloads: StepPayloads,
        section: int,
        key: SectionKey,
        overflowed: torch.Tensor,
    ) -> None:
        """Decode K, V or both of a layer group. overflowed: int32, set for rows out of range."""
        resident, workspace = self._coding.resident, self._workspace
        tokens = step.layout.num_rows
        layer_group = key[0]
        row = resident.geometry.row_size(*key)
        rows = workspace.rows[: tokens * row].view(tokens, row)
        self._coding.rows(payloads, section, key, workspace.coefficients, rows)
        if self._point is not None:
            self._point.wait()
        first, end_layer = resident.geometry.layer_groups[layer_group]
        for tensor, part in resident.geometry.row_parts(*key).items():
            scatter_rows(
                self._cache.tensor(tensor),
                step.slots,
                step.positions,
                within(resident.rotations[tensor], first, end_layer),
                resident.means[tensor][resident.columns(layer_group, tensor)],
                rows[:, part],
                first_layer=first,
                overflowed=overflowed if rows.dtype == torch.float16 else None,
            )
