"""The rows of any tensor-parallel rank, from one capture.

A rank caches some of the KV heads of every layer, so its rows are slices of what was captured.
Sampling does not depend on ranks: all ranks of a capture hold the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvtc_vllm.calibration.rows import CapturedRows
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.codec.artifact import Kind
from kvtc_vllm.codec.errors import ArtifactError


def rank_heads(total: int, tp: int, rank: int) -> range:
    """KV heads of a rank, as vLLM divides `total` of them among `tp` ranks.

    With more ranks than heads, neighbouring ranks hold copies of one head. Raises ArtifactError
    if the heads divide neither way.
    """
    if total % tp == 0:
        each = total // tp
        return range(rank * each, (rank + 1) * each)
    if tp % total == 0:
        head = rank // (tp // total)
        return range(head, head + 1)
    sizes = [n for n in range(1, total + 1) if total % n == 0]
    raise ArtifactError(
        f"--tp {tp}: the model's {total} KV heads do not divide among {tp} ranks; "
        f"{', '.join(map(str, sizes))} or a multiple of {total} are right"
    )


def layer_groups(num_layers: int, layers_per_group: int | None) -> tuple[tuple[int, int], ...]:
    """Consecutive groups of `layers_per_group` layers (the last may be smaller); None: one."""
    step = layers_per_group or num_layers
    return tuple((first, min(first + step, num_layers)) for first in range(0, num_layers, step))


class RankRows(CapturedRows):
    """Rows of rank `rank` of `tp`, in groups of `layers_per_group` layers.

    readers: all ranks of one capture, of any size. Raises ArtifactError if they hold different
    tokens, or the heads do not divide among `tp` ranks.
    """

    def __init__(
        self, readers: Sequence[SpoolReader], tp: int, rank: int, layers_per_group: int | None
    ) -> None:
        first = readers[0]
        for reader in readers[1:]:
            if not torch.equal(reader.positions, first.positions) or not torch.equal(
                reader.docs, first.docs
            ):
                raise ArtifactError(
                    f"{reader.directory}: holds other tokens than {first.directory}; "
                    "delete the spool and capture again"
                )
        total, captured = first.header.total_kv_heads, len(readers)
        heads = rank_heads(total, tp, rank)
        self._slices: list[tuple[SpoolReader, int, int]] = []
        for number, reader in enumerate(readers):
            there = rank_heads(total, captured, number)
            begin, end = max(heads.start, there.start), min(heads.stop, there.stop)
            # Of copies the first is taken.
            if begin < end and (number == 0 or there != rank_heads(total, captured, number - 1)):
                self._slices.append((reader, begin - there.start, end - there.start))
        geometry = replace(
            first.geometry,
            num_kv_heads=len(heads),
            layer_groups=layer_groups(first.geometry.num_layers, layers_per_group),
        )
        super().__init__(
            geometry, first.ropes, first.layer_rope, first.positions, first.docs, first.heldout
        )

    def cache_rows(self, kind: Kind, index: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Layers first .. end - 1 of the indexed tokens: cache dtype [n, l, h, D]."""
        parts = [
            reader.cache_heads(kind, index, first, end, head, end_head)
            for reader, head, end_head in self._slices
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
