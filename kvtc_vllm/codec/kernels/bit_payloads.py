"""Version 1's payloads in batches: what `payload_kernels` needs around it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import ClassVar

import numpy as np
import torch

from kvtc_vllm.codec.artifact import RankArtifact, SectionKey
from kvtc_vllm.codec.container import SectionKind
from kvtc_vllm.codec.entropy import DEFLATE
from kvtc_vllm.codec.entropy.unit_table import Lengths
from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.codec.frame import SECTION_KIND
from kvtc_vllm.codec.kernels.batches import BasisShape, batches
from kvtc_vllm.codec.kernels.bit_tables import Columns, PlanTables
from kvtc_vllm.codec.kernels.chunks import RowLayout
from kvtc_vllm.codec.kernels.numeric import products
from kvtc_vllm.codec.kernels.payload_coding import (
    DEFLATE_SCRATCH,
    CodedSizes,
    Marks,
    PayloadCoding,
    PayloadPlan,
    RawPayloads,
    StepPayloads,
    StoredPayloads,
    check_finite,
    row_magnitudes,
)
from kvtc_vllm.codec.kernels.payload_kernels import decode_payloads, encode_payloads
from kvtc_vllm.codec.kernels.resident import ColumnOrder, ResidentArtifact, ResidentBatch
from kvtc_vllm.codec.kernels.unit_coders import PlacedSections
from kvtc_vllm.codec.kernels.verified import VerifiedBlob
from kvtc_vllm.codec.payload import BitPlan, bit_plan
from kvtc_vllm.codec.quantizers.base import FP16_MAX
from kvtc_vllm.codec.streams import synchronize, upload


class BitPayloads(PayloadCoding):
    """Of bit plans: every payload's length follows from the number of tokens."""

    failures: ClassVar[Mapping[int, str]] = {1: "a decoded coefficient is not finite"}
    plans: Mapping[SectionKey, BitPlan]

    def __init__(
        self, artifact: RankArtifact, ratio: float, device: torch.device, operand: torch.dtype
    ) -> None:
        self.plans = {key: bit_plan(s, ratio) for key, s in artifact.sections.items()}
        row = artifact.geometry.row_size
        shapes = {
            key: BasisShape(row(*key), Columns.of(plan).width) for key, plan in self.plans.items()
        }
        shared = batches(shapes)
        self._columns = {
            key: Columns.of(self.plans[key], batch.shape.width)
            for batch in shared
            for key in batch.keys
        }
        self._width = sum(columns.width for columns in self._columns.values())
        orders = {key: ColumnOrder(c.width, c.sources) for key, c in self._columns.items()}
        super().__init__(ResidentArtifact(artifact, orders, shared, device, operand))
        self._lock = threading.Lock()
        self._tables: dict[tuple[int, ...], PlanTables] = {}

    def tables(self, lengths: tuple[int, ...]) -> PlanTables:
        """All sections' plans for chunks of `lengths` coded tokens; made once.

        The first time waits for the device: any stream may read them afterwards.
        """
        with self._lock:
            if lengths not in self._tables:
                in_rows = [key for batch in self.resident.batches for key in batch.keys]
                widths = [self._columns[key].width for key in in_rows]
                firsts = dict(zip(in_rows, accumulate(widths, initial=0), strict=False))
                sections = [
                    (self.plans[key], self._columns[key], firsts[key]) for key in self.resident.keys
                ]
                device = self.resident.device
                self._tables[lengths] = PlanTables.build(sections, lengths, device)
                synchronize(device)
            return self._tables[lengths]

    def stored(self, blob: VerifiedBlob, coded: int) -> StoredPayloads:
        first = int(blob.sinks > 0)
        return StoredPayloads(first, blob.tables.sections["raw_length"][first:].astype(np.int64))

    def chunk_room(self, tokens: int) -> tuple[int, int]:
        size = self.tables((tokens,)).payload_stride
        return size, size

    def marked_room(self, chunks: int, tokens: int) -> int:
        return 0

    def usual_marked(self, tokens: int) -> int:
        return 0

    def memory(self, chunks: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        return ()

    def memory_bytes(self, tokens: int) -> int:
        return 0

    def plan(self, layout: RowLayout, stored: Sequence[StoredPayloads]) -> PayloadPlan:
        """Chunk after chunk, and in it section after section."""
        tables, count = self.tables(layout.lengths), len(layout.members)
        starts = np.array(tables.payload_starts, np.int64)
        places = np.arange(count)[:, None] * tables.payload_stride + starts
        first = np.array([own.first for own in stored], np.int64)
        numbers = first[:, None] + np.arange(len(starts))
        members = np.repeat(np.array(layout.members, np.int64), len(starts))
        placed = PlacedSections(members, numbers.ravel(), places.ravel())
        return PayloadPlan(placed, tables.payload_stride * count, np.empty(0, np.int64))

    def coefficients(self, tokens: int, marked: int) -> int:
        """Of all sections together: a launch costs more than their memory."""
        return tokens * self._width

    def decode(self, step: StepPayloads, coefficients: torch.Tensor, rows: torch.Tensor) -> None:
        chunks, tokens = len(step.layout.members), step.layout.num_rows
        tables = self.tables(step.layout.lengths)
        payloads = step.data.view(chunks, tables.payload_stride)
        own = coefficients[: tokens * tables.width].view(tokens, tables.width)
        decode_payloads(payloads, tables, step.table, own, step.flags)
        for batch, part in self.parts(own):
            products(part, batch.synthesis.transpose(1, 2), batch.rows(rows))

    def parts(self, coefficients: torch.Tensor) -> Iterator[tuple[ResidentBatch, torch.Tensor]]:
        """Each batch and its part of coefficients [R, width]: [G, R, w], a view."""
        first = 0
        for batch in self.resident.batches:
            count, width = len(batch.keys), batch.shape.width
            own = coefficients[:, first : first + count * width]
            yield batch, own.view(len(own), count, width).transpose(0, 1)
            first += count * width

    @property
    def sections(self) -> list[tuple[SectionKind, int]]:
        return [(SECTION_KIND[name], group) for group, name in self.resident.keys]

    def payload_bytes(self, tokens: int) -> int:
        return sum(plan.raw_length(tokens) for plan in self.plans.values())

    def encode_bytes(self, tokens: int) -> int:
        payload = sum(plan.raw_length(tokens) for plan in self.plans.values())
        coefficients = self.coefficients(tokens, 0) * torch.float32.itemsize
        return coefficients + DEFLATE_SCRATCH * payload

    def encode(
        self,
        layout: RowLayout,
        rows: torch.Tensor,
        marks: Mapping[int, Marks],
    ) -> RawPayloads:
        device, chunks = self.resident.device, len(layout.members)
        tables = self.tables(layout.lengths)
        shape = chunks, tables.payload_stride
        payloads = torch.empty(shape, dtype=torch.uint8, device=device)
        coefficients = torch.empty((layout.num_rows, tables.width), device=device)
        magnitudes = torch.zeros(chunks, dtype=torch.int32, device=device)
        for batch, part in self.parts(coefficients):
            if batch.shape.width:
                products(batch.rows(rows), batch.analysis, part)
            else:
                found = row_magnitudes(rows[:, batch.columns], layout)
                torch.maximum(magnitudes, found, out=magnitudes)
        encode_payloads(coefficients, tables, upload(layout.table, device), payloads, magnitudes)
        starts, raw, units = _units(layout, tables)
        coder_ids = np.full_like(units, DEFLATE.coder_id)
        return RawPayloads(layout, payloads.flatten(), starts, raw, units, coder_ids, magnitudes)

    def doubtful(self, coded: CodedSizes) -> Marks:
        return ~(coded.magnitudes <= FP16_MAX)

    def check(self, coded: CodedSizes, place: int) -> None:
        magnitude = float(coded.magnitudes[place])
        check_finite(magnitude)
        if magnitude > FP16_MAX:
            raise CodecError("range", "a coefficient is outside the float16 range")


def _units(layout: RowLayout, tables: PlanTables) -> tuple[Lengths, Lengths, Lengths]:
    """Where the units of all chunks begin, their raw lengths, and how many every section has.

    Chunk after chunk, and inside it section after section.
    """
    by_length = []
    for sections in tables.unit_lengths:
        sizes = [np.array(units, np.int64) for units in sections]
        offsets = [
            size.cumsum() - size + start
            for size, start in zip(sizes, tables.payload_starts, strict=True)
        ]
        by_length.append(
            (np.concatenate(offsets), np.concatenate(sizes), [len(size) for size in sizes])
        )
    own = [by_length[tables.lengths.index(tokens)] for tokens in layout.tokens]
    starts = [first + place * tables.payload_stride for place, (first, _, _) in enumerate(own)]
    raw = [sizes for _, sizes, _ in own]
    counts = np.array([counts for *_, counts in own], np.int64)
    return np.concatenate(starts), np.concatenate(raw), counts
