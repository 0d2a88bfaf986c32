"""Verified blobs -> paged cache: step by step, and in a step one layer group after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.artifact import Kind
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kernels.chunks import RowLayout
from kvtc_vllm.codec.kernels.numeric import product
from kvtc_vllm.codec.kernels.paged import PagedCache, within
from kvtc_vllm.codec.kernels.paged_io import scatter_rows
from kvtc_vllm.codec.kernels.payload_kernels import decode_payloads
from kvtc_vllm.codec.kernels.resident import ResidentArtifact
from kvtc_vllm.codec.kernels.unit_coders import PlacedSections, UnitReader
from kvtc_vllm.codec.streams import Event, SideStream

_NOT_FINITE = "a decoded coefficient is not finite"
_OVERFLOW = "a decoded row is outside the float16 range"


@dataclass(frozen=True)
class DecodeStep:
    """Chunks of a load that have been checked and are decoded together."""

    layout: RowLayout
    """Of the chunks' coded tokens."""
    first_coded: npt.NDArray[np.int64]
    """Of each of the layout's members: the number of its first coded section."""
    table: torch.Tensor
    """`RowLayout.table` on the device."""
    slots: torch.Tensor
    """int64 [R] on the device, in the order of the rows; `SKIP` for unwanted tokens."""
    positions: torch.Tensor
    """int64 [R] on the device, in the same order."""


@dataclass(frozen=True)
class DecodeWorkspace:
    """All device memory of one load, taken before anything is launched."""

    payloads: tuple[torch.Tensor, torch.Tensor]
    """uint8, each for the payloads of all layer groups of the largest step."""
    coefficients: torch.Tensor
    """Operand dtype, for the widest section."""
    rows: torch.Tensor
    """float16 or float32, for the widest section."""
    flags: torch.Tensor
    """int32, zero. Of every step one after the other: values that are not finite by chunk, rows
    out of range by row."""

    @classmethod
    def of(
        cls,
        resident: ResidentArtifact,
        row_dtype: torch.dtype,
        chunks: int,
        most_chunks: int,
        tokens: int,
        device: torch.device,
    ) -> DecodeWorkspace:
        """For a load of `chunks` chunks of `tokens` tokens, at most `most_chunks` in a step.

        Raises torch.OutOfMemoryError.
        """
        keys = resident.keys
        payload = sum(resident.tables(*key, (tokens,)).payload_stride for key in keys)
        most = most_chunks * tokens
        row = max(resident.geometry.row_size(*key) for key in keys)
        widest = max(resident.width(*key) for key in keys)
        return cls(
            (
                torch.empty(most_chunks * payload, dtype=torch.uint8, device=device),
                torch.empty(most_chunks * payload, dtype=torch.uint8, device=device),
            ),
            torch.empty(most * widest, dtype=resident.operand, device=device),
            torch.empty(most * row, dtype=row_dtype, device=device),
            torch.zeros(chunks * (1 + tokens), dtype=torch.int32, device=device),
        )


def workspace_bytes_per_token(resident: ResidentArtifact, row_dtype: torch.dtype) -> int:
    """Device memory that decoding takes for each token of a step, compressed bytes apart."""
    widest = row = payload = 0
    for key, plan in resident.plans.items():
        widest = max(widest, resident.width(*key))
        row = max(row, resident.geometry.row_size(*key))
        payload += -(-plan.raw_length(8) // 8)
    return row * row_dtype.itemsize + widest * resident.operand.itemsize + 2 * payload


class Decoder:
    """Decodes the steps of one load and writes the wanted tokens.

    While the current stream works on one step, `inflating` decodes the payloads of the next; two
    buffers go to and fro between them. The host does not wait until `damaged`. point: see
    `PagedKvtcCodec.load`. Whoever gives up in between must wait for `inflating`: its buffers go
    back to the current stream's memory.
    """

    def __init__(
        self,
        resident: ResidentArtifact,
        cache: PagedCache,
        workspace: DecodeWorkspace,
        inflating: SideStream,
        point: Event | None,
    ) -> None:
        self._resident = resident
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
        with self._inflating.after(self._begin, sent, self._free[side]):
            reader = open_reader()
            damaged = reader.inflate(*self._placed(step, self._workspace.payloads[side]))
            ready = Event(device)
        ready.wait()
        count = len(step.layout.members)
        flags = self._workspace.flags[self._flags : self._flags + count + step.layout.num_rows]
        self._flags += len(flags)
        offset = 0
        for key in self._resident.keys:
            offset = self._decode_section(step, *key, side, offset, flags)
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
            infinite = flags[first:last] != 0
            first, by_row = last + layout.num_rows, flags[last : last + layout.num_rows]
            overflowed = np.maximum.reduceat(by_row, layout.first_rows[:-1]) != 0
            for place in np.flatnonzero(infinite | overflowed).tolist():
                why = _NOT_FINITE if infinite[place] else _OVERFLOW
                found[layout.members[place]] = ContainerError("bounds", why)
            found |= reader.damaged()
        return found

    def _placed(
        self, step: DecodeStep, buffer: torch.Tensor
    ) -> tuple[PlacedSections, torch.Tensor]:
        """Where the payloads of all sections of a step go, section after section."""
        lengths, members = step.layout.lengths, np.array(step.layout.members, np.int64)
        strides = np.array(
            [self._resident.tables(*key, lengths).payload_stride for key in self._resident.keys],
            np.int64,
        )
        count = len(members)
        begins = (strides.cumsum() - strides) * count
        places = begins[:, None] + strides[:, None] * np.arange(count)
        numbers = step.first_coded + np.arange(len(strides))[:, None]
        wanted = PlacedSections(np.tile(members, len(strides)), numbers.ravel(), places.ravel())
        return wanted, buffer[: int(strides.sum()) * count]

    def _decode_section(
        self,
        step: DecodeStep,
        layer_group: int,
        tensor: Kind,
        side: int,
        offset: int,
        flags: torch.Tensor,
    ) -> int:
        """Decode K or V of a layer group; returns where the next section's payloads begin."""
        resident, layout, workspace = self._resident, step.layout, self._workspace
        tokens, chunks = layout.num_rows, len(layout.members)
        tables = resident.tables(layer_group, tensor, layout.lengths)
        end = offset + tables.payload_stride * chunks
        payloads = workspace.payloads[side][offset:end].view(chunks, tables.payload_stride)
        coefficients = workspace.coefficients[: tokens * tables.width].view(tokens, tables.width)
        decode_payloads(payloads, tables, step.table, coefficients, flags)
        row = resident.geometry.row_size(layer_group, tensor)
        rows = workspace.rows[: tokens * row].view(tokens, row)
        product(coefficients, resident.synthesis[layer_group, tensor].T, rows)
        if self._point is not None:
            self._point.wait()
        first, end_layer = resident.geometry.layer_groups[layer_group]
        scatter_rows(
            self._cache.tensor(tensor),
            step.slots,
            step.positions,
            within(resident.rotations[tensor], first, end_layer),
            resident.means[tensor][resident.columns(layer_group, tensor)],
            rows,
            first_layer=first,
            overflowed=flags[chunks:] if rows.dtype == torch.float16 else None,
        )
        return end
