"""Bit plans as tables on the device, and the column order that their bases have there.

The columns of a coefficient group stay together; groups that are wide enough to be coded in tiles
begin at multiples of `COLUMNS`, so that their coefficients are read and written in whole words;
columns that no group reads are left out; zeros fill the gaps and the end.

The tables of a bit plan hold all that a kernel needs to find a code or a shift: where each
coefficient group starts, and where its packed codes lie in the payload. They are listed in tiles
over all coefficient groups, so that one launch covers groups of 1 and of 1024 coefficients without
idle programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    def of(cls, plan: BitPlan) -> Columns:
        starts: list[int] = []
        sources: list[int] = []
        for group in plan.groups:
            if is_wide(group.size):
                sources += [-1] * (-len(sources) % COLUMNS)
            starts.append(len(sources))
            sources += range(group.start, group.start + group.size)
        sources += [-1] * (-len(sources) % COLUMNS)
        return cls(len(sources), tuple(starts), torch.tensor(sources, dtype=torch.int64))

    def gaps(self) -> list[tuple[int, int]]:
        """(first, columns) of every stretch of zeros."""
        found: list[tuple[int, int]] = []
        for column in torch.nonzero(self.sources < 0).flatten().tolist():
            if found and sum(found[-1]) == column:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((column, 1))
        return found


def is_wide(size: int) -> bool:
    """Whether a coefficient group of this size is coded in tiles of `COLUMNS` columns."""
    return size % COLUMNS == 0


@dataclass(frozen=True)
class PlanTables:
    """A bit plan for chunks of some lengths, resident on a device."""

    width: int
    """Columns of coefficients, see `Columns`."""
    lengths: tuple[int, ...]
    """The different numbers of coded tokens per chunk, ascending."""
    payload_bytes: tuple[int, ...]
    """Bytes per chunk before entropy coding, of each of `lengths`."""
    groups: torch.Tensor
    """Coefficient groups in stored order, int64 [lengths, n, 4]: first column, size, type id,
    offset of the packed codes in the payload."""
    tiles: torch.Tensor
    """int32 [m, 4]: kind, and for `WIDE`: coefficient group, first token, first column inside
    it; for `NARROW`: coefficient group, first byte of its packed codes, 0; for `ZERO`, which only
    unpacking has: first token, first column, columns. They cover the longest chunk."""
    coded_tiles: int
    """How many of the tiles are not `ZERO`; they come first."""
    unit_lengths: tuple[tuple[int, ...], ...]
    """Raw bytes of the entropy coder's units, in order, of each of `lengths`; a unit never
    crosses the end of a stream (see `payload`)."""

    @property
    def num_groups(self) -> int:
        return int(self.groups.shape[1])

    @property
    def payload_stride(self) -> int:
        """Bytes from one chunk's payload to the next one's."""
        return padded_payload(self.payload_bytes[-1])

    @classmethod
    def build(
        cls, plan: BitPlan, columns: Columns, lengths: Sequence[int], device: torch.device
    ) -> PlanTables:
        """Tables of `plan` for chunks of `lengths` coded tokens, ascending."""
        place = {
            group.start: start for group, start in zip(plan.groups, columns.starts, strict=True)
        }
        groups = [
            (place[group.start], group.size, type_id, offset)
            for tokens in lengths
            for group, type_id, offset in _stored(plan, tokens)
        ]
        token_tiles = range(0, lengths[-1], TOKENS)
        tiles: list[tuple[int, int, int, int]] = []
        for index, (group, _, _) in enumerate(_stored(plan, lengths[-1])):
            if is_wide(group.size):
                inner = range(0, group.size, COLUMNS)
                tiles += [(WIDE, index, token, first) for token in token_tiles for first in inner]
        for batch in batches(plan):
            if not is_wide(batch.size):
                packed = range(0, batch.packed_bytes(lengths[-1]), NARROW_BYTES)
                for index in range(batch.first, batch.first + batch.count):
                    tiles += [(NARROW, index, first, 0) for first in packed]
        coded = len(tiles)
        for first, count in columns.gaps():
            tiles += [(ZERO, token, first, count) for token in token_tiles]
        return cls(
            width=columns.width,
            lengths=tuple(lengths),
            payload_bytes=tuple(payload_length(plan, tokens) for tokens in lengths),
            groups=torch.tensor(groups, dtype=torch.int64).view(len(lengths), -1, 4).to(device),
            tiles=torch.tensor(tiles, dtype=torch.int32).view(-1, 4).to(device),
            coded_tiles=coded,
            unit_lengths=tuple(
                tuple(cut_units(stream_lengths(plan, tokens))) for tokens in lengths
            ),
        )


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
