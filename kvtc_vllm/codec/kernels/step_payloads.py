"""Version 2's payloads in batches: marks, and what `step_decoding` needs around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch

from kvtc_vllm.codec.artifact import RankArtifact, SectionKey
from kvtc_vllm.codec.base import read_section
from kvtc_vllm.codec.container import SectionKind, joined_rows
from kvtc_vllm.codec.entropy import RAW, UNIT_BYTES
from kvtc_vllm.codec.entropy.unit_table import Lengths
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.frame import SECTION_KIND
from kvtc_vllm.codec.kernels.batches import batches
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
    count_marked,
)
from kvtc_vllm.codec.kernels.resident import ResidentArtifact, padded_payload
from kvtc_vllm.codec.kernels.step_decoding import UNEVEN, decode_sections, find_escapes
from kvtc_vllm.codec.kernels.step_encoder import count_coefficients, encode_step
from kvtc_vllm.codec.kernels.step_tables import (
    StepColumns,
    StepTables,
    basis_shape,
    bytes_per_column,
    column_order,
)
from kvtc_vllm.codec.kernels.unit_coders import PlacedSections
from kvtc_vllm.codec.kernels.verified import VerifiedBlob
from kvtc_vllm.codec.marks import (
    BEYOND_KIND,
    around_marked,
    check_taken,
    marks_length,
    no_beyond,
    unpack_marks,
)
from kvtc_vllm.codec.v2.codes import MAX_LEVEL, uneven_escapes
from kvtc_vllm.codec.v2.plan import StepPlan, step_plan

_ROOM_FOR_ESCAPES = 1.5
"""Payload bytes of a step over those of its packed codes. More only makes smaller steps."""
_COUNT_BYTES = 4
_LENGTHS = 64
"""Numbers of coded or marked tokens whose bounds and room are remembered."""
_NO_BOUND = np.iinfo(np.int64).max
_PART = 4
"""Numbers of a payload: first byte, bytes, tokens, first row."""


class StepPlanPayloads(PayloadCoding):
    """Of step plans: a payload's length follows from its escapes, and some tokens are marked.

    Marked tokens have a product of their own, of all that they have; the rows that the others'
    product gives for them are not looked at.
    """

    failures: ClassVar[Mapping[int, str]] = {UNEVEN: str(uneven_escapes())}
    plans: Mapping[SectionKey, StepPlan]

    def __init__(
        self, artifact: RankArtifact, ratio: float, device: torch.device, operand: torch.dtype
    ) -> None:
        found = {key: step_plan(s, ratio) for key, s in artifact.sections.items()}
        marks = artifact.sink_rule is not None
        row = artifact.geometry.row_size
        shared = batches({key: basis_shape(p, row(*key), marks) for key, p in found.items()})
        orders = {
            key: column_order(found[key], batch.shape, marks)
            for batch in shared
            for key in batch.keys
        }
        super().__init__(ResidentArtifact(artifact, orders, shared, device, operand))
        self.plans = {key: found[key] for key in self.resident.keys}
        self.rule = artifact.sink_rule
        self._per_key = 1 if self.rule is None else 2
        """Sections of each key."""
        beyond = [plan.beyond for plan in self.plans.values()]
        self._has_beyond = np.array([plan is not None for plan in beyond])
        self._columns_beyond = np.array([StepColumns.of(plan).counts for plan in beyond], np.int64)
        self.tables = StepTables.build(self.plans, shared, marks, operand, device)
        self._room = lru_cache(_LENGTHS)(self._list_room)
        self._encoding = lru_cache(_LENGTHS)(self._list_encoding)
        self._bounds = lru_cache(_LENGTHS)(self._list_bounds)
        self._bounds_beyond = lru_cache(_LENGTHS)(self._list_bounds_beyond)

    def stored(self, blob: VerifiedBlob, coded: int) -> StoredPayloads:
        first = int(blob.sinks > 0)
        if self.rule is None:
            return StoredPayloads(first, self._lengths(blob, first))
        bitmap = read_section(blob.section(first), blob.view)
        marks = unpack_marks(bitmap, coded).numpy()
        lengths = self._lengths(blob, first + 1)
        marked, beyond = int(marks.sum()), lengths[1::2]
        there = self._has_beyond & (marked > 0)
        if beyond[~there].any():
            number = 2 * int(np.flatnonzero(~there & (beyond > 0))[0])
            no_beyond(blob.section(first + 2 + number))
        if (beyond < self._columns_beyond @ bytes_per_column(marked)).any():
            raise uneven_escapes()
        return StoredPayloads(first + 1, lengths, marks)

    def stored_in(
        self, blobs: Sequence[VerifiedBlob], coded: Sequence[int]
    ) -> list[StoredPayloads | ContainerError]:
        """Marks of the blobs that begin with them are looked at together: one by one they take
        longer than all the rest. What is unusual about a blob, `stored` says."""
        found: dict[int, StoredPayloads] = {}
        if self.rule is not None:
            alike: dict[int, list[int]] = {}
            for place, (blob, tokens) in enumerate(zip(blobs, coded, strict=True)):
                if not blob.sinks:
                    alike.setdefault(tokens, []).append(place)
            for tokens, places in alike.items():
                own = self._stored_alike([blobs[place] for place in places], tokens)
                found |= {
                    place: stored
                    for place, stored in zip(places, own, strict=True)
                    if stored is not None
                }
        others = [place for place in range(len(blobs)) if place not in found]
        looked = super().stored_in([blobs[i] for i in others], [coded[i] for i in others])
        return list((dict(zip(others, looked, strict=True)) | found)[i] for i in range(len(blobs)))

    def _stored_alike(
        self, blobs: Sequence[VerifiedBlob], tokens: int
    ) -> list[StoredPayloads | None]:
        """Of blobs without exact tokens. None: who knows."""
        size = marks_length(tokens)
        rows = joined_rows([blob.tables for blob in blobs]).reshape(len(blobs), -1)
        raw = rows["raw_length"].astype(np.int64)
        marks_rows = rows[:, 0]
        right = (
            (marks_rows["coder_id"] == RAW.coder_id)
            & (marks_rows["units"] == 0)
            & (raw[:, 0] == size)
            & (marks_rows["stored_length"] == size)
        )
        bitmaps = np.zeros((len(blobs), size), np.uint8)
        for place in np.flatnonzero(right).tolist():
            blob = blobs[place]
            bitmaps[place] = np.frombuffer(blob.view, np.uint8, size, blob.tables.body)
        bits = np.unpackbits(bitmaps, axis=1, bitorder="little").astype(np.bool_)
        right &= ~bits[:, tokens:].any(1)
        marks = bits[:, :tokens]
        marked = marks.sum(1)
        beyond = raw[:, 2::2]
        there = self._has_beyond & (marked > 0)[:, None]
        right &= ~((beyond > 0) & ~there).any(1)
        right &= (beyond >= bytes_per_column(marked) @ self._columns_beyond.T).all(1)
        return [
            StoredPayloads(1, raw[place, 1:], marks[place]) if sound else None
            for place, sound in enumerate(right.tolist())
        ]

    def chunk_room(self, tokens: int) -> tuple[int, int]:
        return self._room(tokens)[1:]

    def _list_room(self, tokens: int) -> tuple[int, int, int]:
        """`payload_bytes`, and both numbers of `chunk_room`."""
        plans = [section.plan for section in self.tables.sections if section.plan is not None]
        most = sum(plan.most_raw_length(tokens) for plan in plans)
        places = padded_payload(1) * len(self.tables.sections)
        packed = sum(plan.raw_length(tokens) for plan in self.plans.values())
        usual = int(packed * _ROOM_FOR_ESCAPES)
        return usual, usual + places, most + places

    def marked_room(self, chunks: int, tokens: int) -> int:
        if self.rule is None:
            return 0
        return max(tokens, self.usual_marked(tokens) * chunks)

    def usual_marked(self, tokens: int) -> int:
        return 0 if self.rule is None else self.rule.most(tokens)

    def memory(self, chunks: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Escapes, wide escapes, totals."""
        counted = chunks * self.tables.num_columns
        totals = chunks * len(self.tables.sections)
        return tuple(
            torch.empty(size, dtype=torch.int32, device=device)
            for size in (counted, counted, totals)
        )

    def memory_bytes(self, tokens: int) -> int:
        return _COUNT_BYTES * (2 * self.tables.num_columns + len(self.tables.sections))

    def plan(self, layout: RowLayout, stored: Sequence[StoredPayloads]) -> PayloadPlan:
        """Chunk after chunk, and in it section after section."""
        count, per_key = len(stored), self._per_key
        lengths = np.array([own.lengths for own in stored], np.int64)
        padded = padded_payload(lengths).ravel()
        places = (padded.cumsum() - padded).reshape(lengths.shape)
        tokens = np.array(layout.tokens, np.int64)
        marks = count_marked([own.marks for own in stored])
        firsts = np.array(layout.first_rows[:-1], np.int64)
        parts = np.empty((lengths.shape[1], count, _PART), np.int64)
        parts[..., 0], parts[..., 1] = places.T, lengths.T
        parts[..., 2], parts[..., 3] = tokens, firsts
        numbers = [parts]
        if per_key == 2:
            parts[1::2, :, 2], parts[1::2, :, 3] = marks, marks.cumsum() - marks
            marked = np.concatenate([own.marks for own in stored])
            numbers.append(np.where(marked, marked.cumsum(), 0))
        there = lengths.ravel() > 0
        first = np.array([own.first for own in stored], np.int64)
        sections = first[:, None] + np.arange(lengths.shape[1])
        members = np.repeat(np.array(layout.members, np.int64), lengths.shape[1])
        return PayloadPlan(
            PlacedSections(members[there], sections.ravel()[there], places.ravel()[there]),
            int(padded.sum()),
            np.concatenate([x.ravel() for x in numbers]),
            int(marks.sum()),
        )

    def coefficients(self, tokens: int, marked: int) -> int:
        """Of all sections together: a launch costs more than their memory."""
        return tokens * self.tables.own_columns + marked * self.tables.num_columns

    def decode(self, step: StepPayloads, coefficients: torch.Tensor, rows: torch.Tensor) -> None:
        chunks, parts = len(step.layout.members), self._parts(step)
        escapes, wides, totals = step.own
        found = escapes, wides, totals
        find_escapes(step.data, parts, chunks, self.tables, *found, damaged=step.flags)
        here = step.data, parts, chunks, self.tables
        counts = step.layout.num_rows, step.marked
        decode_sections(*here, found, coefficients, counts, self.others(step))
        self._multiply(step, coefficients, rows)

    def others(self, step: StepPayloads) -> torch.Tensor | None:
        if self.tables.all_coded:
            return None
        return step.numbers[self._parts(step).numel() :][: step.layout.num_rows]

    def _multiply(self, step: StepPayloads, coefficients: torch.Tensor, rows: torch.Tensor) -> None:
        tokens, marked = step.layout.num_rows, step.marked
        first, first_marked = 0, tokens * self.tables.own_columns
        for batch in self.resident.batches:
            count, shape = len(batch.keys), batch.shape
            inverse, out = batch.synthesis.transpose(1, 2), batch.rows(rows)
            size = count * tokens * shape.width
            own = coefficients[first : first + size].view(count, tokens, shape.width)
            products(own, inverse[:, : shape.width], out[:, :tokens])
            first += size
            if marked:
                size = count * marked * shape.total
                more = coefficients[first_marked : first_marked + size]
                products(more.view(count, marked, shape.total), inverse, out[:, tokens:])
                first_marked += size

    def _parts(self, step: StepPayloads) -> torch.Tensor:
        count = len(self.tables.sections) * len(step.layout.members)
        return step.numbers[: count * _PART]

    @staticmethod
    def _lengths(blob: VerifiedBlob, first: int) -> Lengths:
        lengths: Lengths = blob.tables.sections["raw_length"][first:].astype(np.int64)
        return lengths

    @property
    def sections(self) -> list[tuple[SectionKind, int]]:
        kinds = (SECTION_KIND, BEYOND_KIND)[: self._per_key]
        return [(kind[name], group) for group, name in self.resident.keys for kind in kinds]

    def payload_bytes(self, tokens: int) -> int:
        return self._room(tokens)[0]

    def stored_bytes(self, tokens: int) -> int:
        # As calibrated, all of a section's bytes.
        return int(sum(plan.token_bytes for plan in self.plans.values()) * tokens)

    def encode_bytes(self, tokens: int) -> int:
        return self._encoding(tokens)

    def _list_encoding(self, tokens: int) -> int:
        most = self.usual_marked(tokens)
        space = count_coefficients(self.resident, tokens, most) * torch.float32.itemsize
        # Rows of marked tokens are copied.
        space += most * self.resident.row * self.resident.operand.itemsize
        counts = 2 * _COUNT_BYTES * self.tables.num_columns
        return space + counts + DEFLATE_SCRATCH * self.payload_bytes(tokens)

    def encode(
        self,
        layout: RowLayout,
        rows: torch.Tensor,
        marks: Mapping[int, Marks],
    ) -> RawPayloads:
        own = [marks[member] for member in layout.members]
        return encode_step(self.resident, self.tables, layout, rows, own)

    def doubtful(self, coded: CodedSizes) -> Marks:
        taken = UNIT_BYTES * coded.sizes[..., 0] + coded.sizes[..., 2]
        own = taken.reshape(len(taken), -1, self._per_key)
        most = np.array([self._bounds(tokens) for tokens in coded.tokens.tolist()])
        beyond = np.array([self._bounds_beyond(marked) for marked in coded.marked.tolist()])
        # Both together are no less than the first, so one bound does for both.
        large = (own.sum(2) > most) | (own[..., -1] > beyond)
        doubtful: Marks = ~(coded.magnitudes < MAX_LEVEL) | large.any(1)
        return doubtful

    def check(self, coded: CodedSizes, place: int) -> None:
        magnitude, tokens = float(coded.magnitudes[place]), int(coded.tokens[place])
        marked, sizes = int(coded.marked[place]), coded.sizes[place]
        check_finite(magnitude)
        taken = UNIT_BYTES * sizes[:, 0] + sizes[:, 2]
        for i, plan in enumerate(self.plans.values()):
            if not magnitude < MAX_LEVEL:
                raise plan.range_error()
            own = int(taken[self._per_key * i])
            plan.check_size(own, tokens)
            if self._per_key == 2:
                beyond = int(taken[2 * i + 1])
                if plan.beyond is not None and marked:
                    plan.beyond.check_size(beyond, marked)
                check_taken(plan, tokens, own + beyond)

    def _list_bounds(self, tokens: int) -> Lengths:
        """Bytes that the sections of each key may take together, int64 [keys]."""
        around = around_marked(tokens) if self._per_key == 2 else 0
        return np.array([plan.max_bytes(tokens) - around for plan in self.plans.values()], np.int64)

    def _list_bounds_beyond(self, marked: int) -> Lengths:
        """Bytes that what is beyond may take, int64 [keys]."""
        plans = [plan.beyond if marked else None for plan in self.plans.values()]
        most = [_NO_BOUND if plan is None else plan.max_bytes(marked) for plan in plans]
        return np.array(most, np.int64)
