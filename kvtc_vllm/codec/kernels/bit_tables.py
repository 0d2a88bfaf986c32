"""Bit plans as tables on the device, and the column order that their bases have there.

The columns of a coefficient group stay together; groups that are wide enough to be coded in tiles
begin at multiples of `COLUMNS`, so that their coefficients are read and written in whole words;
columns that no group reads are left out; zeros fill the gaps and the end.

The tables of bit plans hold all that a kernel needs to find a code or a shift: where each
coefficient group starts, and where its packed codes lie in the payload. They are listed in tiles
over all coefficient groups of all sections, so that one launch covers groups of 1 and of 1024
coefficients without idle programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from kvtc_vllm.codec.entropy import cut_units
from kvtc_vllm.codec.kernels.resident import COLUMNS, padded_payload
from kvtc_vllm.codec.payload import (
    FP16_BYTES,
    BitPlan,
    CoefficientGroup,
    batches,
    payload_length,
    stream_lengths,
)

TOKENS = 32
"""Tokens of a tile of a wide coefficient group, whose columns are `COLUMNS`."""
NARROW_BYTES = 256
"""Bytes of packed codes of a tile of a narrow coefficient group."""
WIDE, NARROW, ZERO = 0, 1, 2
"""Kinds of tiles, see `PlanTables.tiles`."""


@dataclass(frozen=True)
class Columns:
    """The resident order of the columns that a plan reads.

    width: a multiple of `COLUMNS`. starts: first column of every group of the plan, in the plan's
    order. sources: int64 [width], which column of the basis each is; -1 for zeros.
    """

    width: int
    starts: tuple[int, ...]
    sources: torch.Tensor

    @classmethod
    def of(cls, plan: BitPlan, width: int = 0) -> Columns:
        """width: columns to fill them up to, if they are fewer."""
        starts: list[int] = []
        sources: list[int] = []
        for group in plan.groups:
            if is_wide(group.size):
                sources += [-1] * (-len(sources) % COLUMNS)
            starts.append(len(sources))
            sources += range(group.start, group.start + group.size)
        sources += [-1] * max(-len(sources) % COLUMNS, width - len(sources))
        return cls(len(sources), tuple(starts), torch.tensor(sources, dtype=torch.int64))

    def gaps(self) -> list[tuple[int, int]]:
        """(first, columns) of every stretch of zeros, `COLUMNS` of them at most."""
        found: list[tuple[int, int]] = []
        for column in torch.nonzero(self.sources < 0).flatten().tolist():
            if found and sum(found[-1]) == column and found[-1][1] < COLUMNS:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((column, 1))
        return found


def is_wide(size: int) -> bool:
    """Whether a coefficient group of this size is coded in tiles of `COLUMNS` columns."""
    return size % COLUMNS == 0


@dataclass(frozen=True)
class PlanTables:
    """The bit plans of some sections for chunks of some lengths, resident on a device.

    A chunk's payloads lie one behind the other, and so do their columns in a row of coefficients.
    """

    width: int
    """Columns of coefficients of all sections, see `Columns`."""
    lengths: tuple[int, ...]
    """The different numbers of coded tokens per chunk, ascending."""
    payload_bytes: tuple[tuple[int, ...], ...]
    """Bytes of a chunk's payloads before entropy coding, of each of `lengths`."""
    payload_starts: tuple[int, ...]
    """Where each section's payload begins, from where the chunk's first does."""
    payload_stride: int
    """Bytes from one chunk's payloads to the next one's."""
    groups: torch.Tensor
    """Coefficient groups in stored order, section after section, int64 [lengths, n, 6]: first
    column, size, type id, and from where the chunk's payloads begin: packed codes, scales; bytes
    from one stream of scales to the next."""
    tiles: torch.Tensor
    """int32 [m, 4]: kind, and for `WIDE`: coefficient group, first token, first column inside
    it; for `NARROW`: coefficient group, first byte of its packed codes, 0; for `ZERO`, which only
    unpacking has: first token, first column, columns. They cover the longest chunk."""
    coded_tiles: int
    """How many of the tiles are not `ZERO`; they come first."""
    unit_lengths: tuple[tuple[tuple[int, ...], ...], ...]
    """Raw bytes of the entropy coder's units, in order, of each of `lengths` and each section; a
    unit never crosses the end of a stream (see `payload`)."""

    @property
    def num_groups(self) -> int:
        return int(self.groups.shape[1])

    @classmethod
    def build(
        cls,
        sections: Sequence[tuple[BitPlan, Columns, int]],
        lengths: Sequence[int],
        device: torch.device,
    ) -> PlanTables:
        """For chunks of `lengths` coded tokens, ascending.

        sections: plan, columns and the first of them in a row of coefficients of all sections.
        """
        plans = [plan for plan, _, _ in sections]
        sizes = [tuple(payload_length(plan, tokens) for plan in plans) for tokens in lengths]
        *starts, stride = accumulate(map(padded_payload, sizes[-1]), initial=0)
        groups: list[tuple[int, ...]] = []
        for tokens in lengths:
            for (plan, columns, column), start in zip(sections, starts, strict=True):
                groups += _groups(plan, columns, column, start, tokens)
        coded: list[tuple[int, int, int, int]] = []
        zeros: list[tuple[int, int, int, int]] = []
        first = 0
        for plan, columns, column in sections:
            coded += _tiles(plan, first, lengths[-1])
            first += len(plan.groups)
            for gap, count in columns.gaps():
                zeros += [
                    (ZERO, token, column + gap, count) for token in range(0, lengths[-1], TOKENS)
                ]
        return cls(
            width=sum(columns.width for _, columns, _ in sections),
            lengths=tuple(lengths),
            payload_bytes=tuple(sizes),
            payload_starts=tuple(starts),
            payload_stride=stride,
            groups=torch.tensor(groups, dtype=torch.int64).view(len(lengths), -1, 6).to(device),
            tiles=torch.tensor(coded + zeros, dtype=torch.int32).view(-1, 4).to(device),
            coded_tiles=len(coded),
            unit_lengths=tuple(
                tuple(tuple(cut_units(stream_lengths(plan, tokens))) for plan in plans)
                for tokens in lengths
            ),
        )


def _groups(
    plan: BitPlan, columns: Columns, first: int, payload: int, tokens: int
) -> list[tuple[int, ...]]:
    """Rows of `PlanTables.groups`. first: column of the section. payload: where its own begins."""
    place = {group.start: start for group, start in zip(plan.groups, columns.starts, strict=True)}
    stream = len(plan.groups) * tokens
    return [
        (
            first + place[group.start],
            group.size,
            type_id,
            payload + offset,
            payload + index * tokens,
            stream,
        )
        for index, (group, type_id, offset) in enumerate(_stored(plan, tokens))
    ]


def _tiles(plan: BitPlan, first: int, tokens: int) -> list[tuple[int, int, int, int]]:
    """Of coefficient groups, which are numbered from `first` on."""
    tiles: list[tuple[int, int, int, int]] = []
    for index, (group, _, _) in enumerate(_stored(plan, tokens)):
        if is_wide(group.size):
            inner = range(0, group.size, COLUMNS)
            tiles += [
                (WIDE, first + index, token, column)
                for token in range(0, tokens, TOKENS)
                for column in inner
            ]
    for batch in batches(plan):
        if not is_wide(batch.size):
            packed = range(0, batch.packed_bytes(tokens), NARROW_BYTES)
            for index in range(batch.first, batch.first + batch.count):
                tiles += [(NARROW, first + index, byte, 0) for byte in packed]
    return tiles


def _stored(plan: BitPlan, tokens: int) -> list[tuple[CoefficientGroup, int, int]]:
    """Groups in stored order with type id and offset of the packed codes in the payload."""
    by_start = {group.start: group for group in plan.groups}
    found: list[tuple[CoefficientGroup, int, int]] = []
    offset = 2 * FP16_BYTES * len(plan.groups) * tokens
    for batch in batches(plan):
        for start in batch.starts:
            found.append((by_start[start], batch.quantizer.type_id, offset))
            offset += batch.packed_bytes(tokens)
    return found
