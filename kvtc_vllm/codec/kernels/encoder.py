"""Staged rows -> blobs, for batches of chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvtc_vllm.codec.artifact import KINDS, Kind
from kvtc_vllm.codec.entropy import EncodedSection, UnitList, aligned
from kvtc_vllm.codec.kernels.chunks import Batch, StoreChunk
from kvtc_vllm.codec.kernels.numeric import product
from kvtc_vllm.codec.kernels.payload_kernels import encode_payloads
from kvtc_vllm.codec.kernels.resident import PlanTables, ResidentArtifact
from kvtc_vllm.codec.kernels.unit_coders import UnitCoder
from kvtc_vllm.codec.transform import magnitudes


@dataclass(frozen=True)
class StagedChunks:
    """Chunks read out of the paged cache; their blocks may be overwritten now."""

    chunks: tuple[StoreChunk, ...]
    tokens: tuple[int, ...]
    """Of each chunk."""
    sinks: tuple[int, ...]
    """Exact leading tokens of each chunk."""
    batches: tuple[Batch, ...]
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
class CodedChunk:
    """sections: in the container's order. magnitude: of all values; NaN or inf if not finite."""

    sections: tuple[EncodedSection, ...]
    magnitude: float


def encode_rows(
    staged: StagedChunks,
    resident: ResidentArtifact,
    ratio: float,
    coder: UnitCoder,
    workspace_bytes: int,
) -> dict[int, CodedChunk]:
    """Encode the coded part of every chunk of every batch. Waits for the device.

    workspace_bytes: limit for the coefficients of one product; a single chunk may exceed it.
    """
    layout = list(_sections(staged.batches, resident, ratio))
    total = sum(size for *_, size in layout)
    device = next(iter(staged.rows.values())).device
    payloads = torch.empty(total, dtype=torch.uint8, device=device)
    found: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(staged.batches))}
    lengths: list[int] = []
    offset = 0
    for number, batch, layer_group, tensor, size in layout:
        tables = resident.tables(layer_group, tensor, ratio, batch.tokens)
        rows = staged.rows[tensor][batch.rows, resident.columns(layer_group, tensor)]
        out = payloads[offset : offset + size].view(len(batch.members), tables.payload_bytes)
        basis = resident.analysis[layer_group, tensor][:, : tables.rank]
        found[number].append(_encode_batch(rows, basis, tables, out, workspace_bytes))
        lengths += tables.unit_lengths * len(batch.members)
        offset += size
    stored, body = coder.deflate(payloads, lengths)
    largest = {
        number: torch.stack(parts).amax(0).tolist() for number, parts in found.items() if parts
    }
    cut = _cut(layout, resident, ratio, lengths, stored, body)
    return {
        index: CodedChunk(tuple(cut[index]), largest[number][place])
        for number, batch in enumerate(staged.batches)
        for place, index in enumerate(batch.members)
    }


def _sections(
    batches: Sequence[Batch], resident: ResidentArtifact, ratio: float
) -> Iterator[tuple[int, Batch, int, Kind, int]]:
    """Number of the batch, batch, layer group, K or V, payload bytes, in the order of payloads."""
    for number, batch in enumerate(batches):
        for layer_group in resident.layer_groups:
            for tensor in KINDS:
                tables = resident.tables(layer_group, tensor, ratio, batch.tokens)
                size = tables.payload_bytes * len(batch.members)
                yield number, batch, layer_group, tensor, size


def _encode_batch(
    rows: torch.Tensor,
    basis: torch.Tensor,
    tables: PlanTables,
    out: torch.Tensor,
    workspace_bytes: int,
) -> torch.Tensor:
    """Fill `out` [chunks, bytes]; returns the `magnitudes` of the chunks, float32 [chunks]."""
    if tables.rank == 0:
        return _chunk_magnitudes(rows, len(out))
    chunk_bytes = tables.tokens * tables.rank * torch.float32.itemsize
    step = max(1, workspace_bytes // chunk_bytes)
    found: list[torch.Tensor] = []
    for first in range(0, len(out), step):
        part = out[first : first + step]
        some = rows[first * tables.tokens :][: len(part) * tables.tokens]
        room = torch.empty(len(some), tables.rank, device=some.device)
        coefficients = product(some, basis, room)
        found.append(_chunk_magnitudes(coefficients, len(part)))
        encode_payloads(coefficients, tables, part)
    return torch.cat(found)


def _chunk_magnitudes(x: torch.Tensor, chunks: int) -> torch.Tensor:
    return magnitudes(x.reshape(chunks, -1), dim=1).float()


def _cut(
    layout: Sequence[tuple[int, Batch, int, Kind, int]],
    resident: ResidentArtifact,
    ratio: float,
    lengths: Sequence[int],
    stored: Sequence[int],
    body: memoryview,
) -> dict[int, list[EncodedSection]]:
    """Divide units and body among the chunks' sections."""
    units = np.array((lengths, stored), np.int64).T
    ends = np.concatenate((np.zeros(1, np.int64), aligned(units[:, 1]).cumsum()))
    cut: dict[int, list[EncodedSection]] = {}
    first = 0
    for _, batch, layer_group, tensor, _ in layout:
        count = len(resident.tables(layer_group, tensor, ratio, batch.tokens).unit_lengths)
        for index in batch.members:
            last = first + count
            part = bytes(body[ends[first] : ends[last]])
            cut.setdefault(index, []).append(EncodedSection(UnitList.of(units[first:last]), part))
            first = last
    return cut
