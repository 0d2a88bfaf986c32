"""A bit plan for chunks of a given length, as tables on the device.

Everything a kernel needs to find a code or a shift: where each group's coefficients start, and
where its run lies in the payload. Runs are cut into tiles of equal size, listed over all groups,
so that one launch covers groups of 1 and of 1024 coefficients without idle programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtc_vllm.codec.entropy import cut_units
from kvtc_vllm.codec.payload import FP16_BYTES, BitPlan, batches, payload_length, stream_lengths

TILE_BYTES = 256
"""Bytes of packed codes that one program of a kernel handles."""


@dataclass(frozen=True)
class PlanTables:
    """Plan and chunk length, resident on a device.

    tokens: coded tokens N of a chunk. groups: int64 [n, 4], in stored order: first coefficient,
    size, quantiser id, offset of the run in the payload. tiles: int32 [m, 2]: group, first byte
    of its run. unit_lengths: raw bytes of the entropy coder's units, in order; a unit never
    crosses the end of a stream (see `payload`).
    """

    rank: int
    tokens: int
    payload_bytes: int
    has_gaps: bool
    groups: torch.Tensor
    tiles: torch.Tensor
    unit_lengths: tuple[int, ...]

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    @classmethod
    def build(cls, plan: BitPlan, tokens: int, device: torch.device) -> PlanTables:
        """Tables of `plan` for chunks of `tokens` coded tokens."""
        groups: list[tuple[int, int, int, int]] = []
        tiles: list[tuple[int, int]] = []
        offset = 2 * FP16_BYTES * len(plan.groups) * tokens
        for batch in batches(plan):
            run_bytes = batch.run_bytes(tokens)
            type_id = batch.quantizer.type_id
            for start in batch.starts:
                tiles += [(len(groups), first) for first in range(0, run_bytes, TILE_BYTES)]
                groups.append((start, batch.size, type_id, offset))
                offset += run_bytes
        return cls(
            rank=plan.rank,
            tokens=tokens,
            payload_bytes=payload_length(plan, tokens),
            has_gaps=sum(group.size for group in plan.groups) < plan.rank,
            groups=torch.tensor(groups, dtype=torch.int64).view(-1, 4).to(device),
            tiles=torch.tensor(tiles, dtype=torch.int32).view(-1, 2).to(device),
            unit_lengths=tuple(cut_units(stream_lengths(plan, tokens))),
        )
