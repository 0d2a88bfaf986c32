"""Version 1's payloads in batches: what `payload_kernels` needs around it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch

from kvtc_vllm.codec.artifact import Kind, RankArtifact, SectionKey, SectionName
from kvtc_vllm.codec.container import SectionKind
from kvtc_vllm.codec.entropy import DEFLATE
from kvtc_vllm.codec.entropy.unit_table import Lengths
from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.codec.frame import SECTION_KIND
from kvtc_vllm.codec.kernels.bit_tables import Columns, PlanTables
from kvtc_vllm.codec.kernels.chunks import RowLayout
from kvtc_vllm.codec.kernels.numeric import product
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
from kvtc_vllm.codec.kernels.resident import ColumnOrder, ResidentArtifact
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
        self._columns = {key: Columns.of(plan) for key, plan in self.plans.items()}
        orders = {key: ColumnOrder(c.width, c.sources) for key, c in self._columns.items()}
        super().__init__(ResidentArtifact(artifact, orders, device, operand))
        self._lock = threading.Lock()
        self._tables: dict[tuple[int, SectionName, tuple[int, ...]], PlanTables] = {}

    def tables(self, layer_group: int, name: SectionName, lengths: tuple[int, ...]) -> PlanTables:
        """The section's plan for chunks of `lengths` coded tokens; made once.

        The first time waits for the device: any stream may read them afterwards.
        """
        key = (layer_group, name, lengths)
        with self._lock:
            if key not in self._tables:
                columns = self._columns[layer_group, name]
                plan = self.plans[layer_group, name]
                device = self.resident.device
                self._tables[key] = PlanTables.build(plan, columns, lengths, device)
                synchronize(device)
            return self._tables[key]

    def stored(self, blob: VerifiedBlob, coded: int) -> StoredPayloads:
        first = int(blob.sinks > 0)
        return StoredPayloads(first, blob.tables.sections["raw_length"][first:].astype(np.int64))

    def chunk_room(self, tokens: int) -> tuple[int, int]:
        keys = self.resident.keys
        size = sum(self.tables(*key, (tokens,)).payload_stride for key in keys)
        return size, size

    def marked_room(self, chunks: int, tokens: int) -> int:
        return 0

    def memory(
        self, chunks: int, tokens: int, row_dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        return ()

    def memory_bytes(self, tokens: int, row_dtype: torch.dtype) -> int:
        return 0

    def plan(self, layout: RowLayout, stored: Sequence[StoredPayloads]) -> PayloadPlan:
        """Section after section, each at a stride of its own."""
        keys, count = self.resident.keys, len(layout.members)
        strides = np.array([self.tables(*k, layout.lengths).payload_stride for k in keys], np.int64)
        begins = (strides.cumsum() - strides) * count
        places = begins[:, None] + strides[:, None] * np.arange(count)
        first = np.array([own.first for own in stored], np.int64)
        numbers = first + np.arange(len(keys))[:, None]
        members = np.tile(np.array(layout.members, np.int64), len(keys))
        placed = PlacedSections(members, numbers.ravel(), places.ravel())
        return PayloadPlan(placed, int(strides.sum()) * count, np.empty(0, np.int64))

    def coefficients(self, tokens: int, marked: int) -> int:
        """Of one section at a time."""
        return tokens * self.resident.widest

    def begin(self, step: StepPayloads, coefficients: torch.Tensor) -> None:
        pass

    def rows(
        self,
        step: StepPayloads,
        section: int,
        key: SectionKey,
        coefficients: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        chunks = len(step.layout.members)
        own = [self.tables(*key, step.layout.lengths) for key in self.resident.keys[: section + 1]]
        tables = own[-1]
        first = sum(t.payload_stride for t in own[:-1]) * chunks
        size = tables.payload_stride * chunks
        payloads = step.data[first : first + size].view(chunks, tables.payload_stride)
        coefficients = coefficients[: len(out) * tables.width].view(len(out), tables.width)
        decode_payloads(payloads, tables, step.table, coefficients, step.flags)
        product(coefficients, self.resident.synthesis[key].T, out)

    @property
    def sections(self) -> list[tuple[SectionKind, int]]:
        return [(SECTION_KIND[name], group) for group, name in self.resident.keys]

    def payload_bytes(self, tokens: int) -> int:
        return sum(plan.raw_length(tokens) for plan in self.plans.values())

    def encode_bytes(self, tokens: int) -> int:
        payload = sum(plan.raw_length(tokens) for plan in self.plans.values())
        coefficients = tokens * self.resident.widest * torch.float32.itemsize
        return coefficients + DEFLATE_SCRATCH * payload

    def encode(
        self,
        layout: RowLayout,
        rows: Mapping[Kind, torch.Tensor],
        marks: Mapping[int, Marks],
    ) -> RawPayloads:
        device = self.resident.device
        chunks, lengths = len(layout.members), layout.lengths
        keys = self.resident.keys
        tables = [self.tables(*key, lengths) for key in keys]
        strides = np.array([t.payload_stride for t in tables], np.int64)
        ends = (strides * chunks).cumsum()
        payloads = torch.empty(int(ends[-1]), dtype=torch.uint8, device=device)
        room = torch.empty(layout.num_rows * max(t.width for t in tables), device=device)
        magnitudes = torch.zeros(chunks, dtype=torch.int32, device=device)
        table = upload(layout.table, device)
        for key, plan, end in zip(keys, tables, ends.tolist(), strict=True):
            x = self.resident.section_rows(key, rows)
            if plan.width == 0:
                torch.maximum(magnitudes, row_magnitudes(x, layout), out=magnitudes)
                continue
            coefficients = room[: len(x) * plan.width].view(len(x), plan.width)
            product(x, self.resident.analysis[key], coefficients)
            size = plan.payload_stride * chunks
            out = payloads[end - size : end].view(chunks, plan.payload_stride)
            encode_payloads(coefficients, plan, table, out, magnitudes)
        starts, raw, units = _units(layout, tables, ends - strides * chunks, strides)
        coder_ids = np.full_like(units, DEFLATE.coder_id)
        return RawPayloads(layout, payloads, starts, raw, units, coder_ids, magnitudes)

    def check(self, coded: CodedSizes) -> None:
        check_finite(coded.magnitude)
        if coded.magnitude > FP16_MAX:
            raise CodecError("range", "a coefficient is outside the float16 range")


def _units(
    layout: RowLayout, tables: Sequence[PlanTables], first: Lengths, strides: Lengths
) -> tuple[Lengths, Lengths, Lengths]:
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
    counts = np.array([counts for *_, counts in own], np.int64)
    return np.concatenate(starts), np.concatenate(raw), counts
