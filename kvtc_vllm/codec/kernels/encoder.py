"""Staged rows -> blobs, for batches of chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvtc_vllm.codec.artifact import KINDS, Kind
from kvtc_vllm.codec.entropy import EncodedSection, UnitList, aligned
from kvtc_vllm.codec.kernels.chunks import Run, StoreChunk
from kvtc_vllm.codec.kernels.matmul import product
from kvtc_vllm.codec.kernels.plan_tables import PlanTables
from kvtc_vllm.codec.kernels.quantize import encode_payloads
from kvtc_vllm.codec.kernels.resident import ResidentArtifact
from kvtc_vllm.codec.kernels.unit_coders import UnitCoder


@dataclass(frozen=True)
class StagedChunks:
    """Chunks read out of the paged cache; their blocks may be overwritten now.

    runs: of the chunks' coded tokens. rows: K and V [R, P] of all layers, pre-RoPE and without
    mean, in the operand dtype. sinks: exact leading tokens of each chunk. sink_rows: K and V
    float32 [sum of sinks, P] as they are in the cache. refused: chunks that cannot be coded.
    """

    chunks: tuple[StoreChunk, ...]
    tokens: tuple[int, ...]
    sinks: tuple[int, ...]
    runs: tuple[Run, ...]
    rows: dict[Kind, torch.Tensor]
    sink_rows: dict[Kind, torch.Tensor]
    refused: dict[int, str]

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
    """Encode the coded part of every chunk of every run. Waits for the device.

    workspace_bytes: limit for the coefficients of one product; a single chunk may exceed it.
    """
    layout = list(_sections(staged.runs, resident, ratio))
    total = sum(size for *_, size in layout)
    device = next(iter(staged.rows.values())).device
    payloads = torch.empty(total, dtype=torch.uint8, device=device)
    magnitudes: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(staged.runs))}
    lengths: list[int] = []
    offset = 0
    for number, run, group, kind, size in layout:
        tables = resident.tables(group, kind, ratio, run.tokens)
        rows = staged.rows[kind][run.rows, resident.columns(group, kind)]
        out = payloads[offset : offset + size].view(len(run.members), tables.payload_bytes)
        basis = resident.analysis[group, kind][:, : tables.rank]
        magnitudes[number].append(_encode_run(rows, basis, tables, out, workspace_bytes))
        lengths += tables.unit_lengths * len(run.members)
        offset += size
    stored, body = coder.deflate(payloads, lengths)
    largest = {
        number: torch.stack(parts).amax(0).tolist() for number, parts in magnitudes.items() if parts
    }
    cut = _cut(layout, resident, ratio, lengths, stored, body)
    return {
        index: CodedChunk(tuple(cut[index]), largest[number][place])
        for number, run in enumerate(staged.runs)
        for place, index in enumerate(run.members)
    }


def _sections(
    runs: Sequence[Run], resident: ResidentArtifact, ratio: float
) -> Iterator[tuple[int, Run, int, Kind, int]]:
    """Number of the run, run, layer group, kind and payload bytes, in the order of payloads."""
    for number, run in enumerate(runs):
        for group in resident.groups:
            for kind in KINDS:
                tables = resident.tables(group, kind, ratio, run.tokens)
                yield number, run, group, kind, tables.payload_bytes * len(run.members)


def _encode_run(
    rows: torch.Tensor,
    basis: torch.Tensor,
    tables: PlanTables,
    out: torch.Tensor,
    workspace_bytes: int,
) -> torch.Tensor:
    """Fill `out` [chunks, bytes]; returns the largest magnitude of each chunk, float32 [chunks]."""
    if tables.rank == 0:
        return _magnitudes(rows, len(out))
    chunk_bytes = tables.tokens * tables.rank * torch.float32.itemsize
    step = max(1, workspace_bytes // chunk_bytes)
    found: list[torch.Tensor] = []
    for first in range(0, len(out), step):
        part = out[first : first + step]
        coefficients = product(rows[first * tables.tokens :][: len(part) * tables.tokens], basis)
        found.append(_magnitudes(coefficients, len(part)))
        encode_payloads(coefficients, tables, part)
    return torch.cat(found)


def _magnitudes(x: torch.Tensor, chunks: int) -> torch.Tensor:
    low, high = torch.aminmax(x.reshape(chunks, -1), dim=1)
    return torch.maximum(-low, high).float()


def _cut(
    layout: Sequence[tuple[int, Run, int, Kind, int]],
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
    for _, run, group, kind, _ in layout:
        count = len(resident.tables(group, kind, ratio, run.tokens).unit_lengths)
        for index in run.members:
            last = first + count
            part = bytes(body[ends[first] : ends[last]])
            cut.setdefault(index, []).append(EncodedSection(UnitList.of(units[first:last]), part))
            first = last
    return cut
