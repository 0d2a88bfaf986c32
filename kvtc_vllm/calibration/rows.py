"""Captured tokens as the rows of one rank: which there are, and their K and V before RoPE."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from kvtc_vllm.artifact.rank_file import PROBE_TOKENS, Probe
from kvtc_vllm.codec.artifact import Geometry, Kind, SectionName
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.quantizers.base import to_fp16
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.transform import rows_from_keys

READING_BYTES = 128 * 2**20
"""Memory that `take` needs besides its result."""

_BLOCK_BYTES = 16 * 2**20


class CapturedRows(ABC):
    """Rows of one rank (a `kvtc_vllm.calibration.fit.RowSource`).

    geometry: of the rank; its layer groups are those to fit.
    ropes, layer_rope: as in `RankArtifact`.
    positions, docs: int64 [n], where each token stood and in which document.
    heldout: bool [n], rows that the fit must not see.
    """

    def __init__(
        self,
        geometry: Geometry,
        ropes: tuple[Rope, ...],
        layer_rope: tuple[int | None, ...],
        positions: torch.Tensor,
        docs: torch.Tensor,
        heldout: torch.Tensor,
    ) -> None:
        self.geometry = geometry
        self.ropes = ropes
        self.layer_rope = layer_rope
        self.positions = positions
        self.docs = docs
        self.heldout = heldout

    @abstractmethod
    def cache_rows(self, kind: Kind, index: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """K or V of the indexed tokens, layers first .. end - 1, as in the cache: [n, l, H, D]."""

    def count(self, *, heldout: bool) -> int:
        """Number of training or held-out rows."""
        return int((self.heldout == heldout).sum())

    def select(
        self,
        *,
        heldout: bool,
        limit: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Numbers of training or held-out rows, rising: int64 [n].

        limit: at most this many, drawn without replacement with `generator`.
        """
        chosen = (self.heldout == heldout).nonzero().flatten()
        if limit is not None and limit < len(chosen):
            drawn = torch.randperm(len(chosen), generator=generator)[:limit]
            chosen = chosen[drawn.sort().values]
        return chosen

    def take(self, group: int, name: SectionName, index: torch.Tensor) -> torch.Tensor:
        """Rows of one layer group, keys un-rotated: float32 [n, p], in the order of `index`.

        Needs `READING_BYTES` of memory besides them.
        """
        first, end = self.geometry.layer_groups[group]
        result = torch.empty(len(index), self.geometry.row_size(group, name))
        ropes = [None if i is None else self.ropes[i] for i in self.layer_rope[first:end]]
        step = max(1, _BLOCK_BYTES // (4 * result.shape[1]))
        for start in range(0, len(index), step):
            part = index[start : start + step]
            for kind, columns in self.geometry.row_parts(group, name).items():
                block = self.cache_rows(kind, part, first, end)
                if kind == "k":
                    rows = rows_from_keys(block, ropes, self.positions[part])
                else:
                    rows = block.float().flatten(1)
                result[start : start + step, columns] = rows
        return result

    def rows(
        self,
        group: int,
        name: SectionName,
        *,
        heldout: bool,
        limit: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """`take` of what `select` selects."""
        return self.take(
            group, name, self.select(heldout=heldout, limit=limit, generator=generator)
        )

    def probe(self, limit: int = PROBE_TOKENS) -> Probe:
        """The first held-out tokens of the document that has most of them.

        Raises ArtifactError if no row is held out.
        """
        if not bool(self.heldout.any()):
            raise ArtifactError("no row of the spool is held out; there is none to take a probe of")
        docs = self.docs[self.heldout]
        values, counts = docs.unique(return_counts=True)
        chosen = (self.heldout & (self.docs == values[counts.argmax()])).nonzero().flatten()
        chosen = chosen[self.positions[chosen].argsort()][:limit]
        positions = self.positions[chosen]
        layers = self.geometry.num_layers
        keys = self.cache_rows("k", chosen, 0, layers)
        ropes = [None if i is None else self.ropes[i] for i in self.layer_rope]
        k = rows_from_keys(keys, ropes, positions).reshape(keys.shape)
        v = self.cache_rows("v", chosen, 0, layers)
        return Probe(k=to_fp16(k), v=to_fp16(v.float()), positions=positions.int())
