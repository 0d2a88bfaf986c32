"""CacheGen: deltas to anchor tokens, layer-dependent bins, arithmetic coding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from kvtc_vllm.codec.artifact import KINDS, Geometry, Kind
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.evaluation.baselines.base import Baseline
from kvtc_vllm.evaluation.baselines.cachegen_codes import (
    Symbols,
    anchor_count,
    dequantize,
    quantize,
)
from kvtc_vllm.evaluation.baselines.cachegen_profile import (
    CacheGenProfile,
    SymbolCounts,
    probabilities,
)
from kvtc_vllm.evaluation.baselines.entropy import decode_columns, encode_columns
from kvtc_vllm.evaluation.baselines.formats import from_bytes, to_cache
from kvtc_vllm.evaluation.settings import Setting, Settings

_SECTION_PARTS = 4


class CacheGen(Baseline):
    """CacheGen (arXiv 2310.07240), its default encoding level.

    Followed: groups of 10 tokens; the first, the anchor, is quantised to 8 bits by
    itself; the others are stored as deltas to it, in bins of 0.5, 1 and 1.5 in the
    first, middle and last third of the layers (setting `bins`, a factor of all three, as its
    other encoding levels); one scale per vector (token, layer and
    K or V); arithmetic coding with a distribution of anchors and one of deltas for every
    layer and channel, profiled once per model. Keys post-RoPE.
    Charged: the coded symbols and a float16 scale per token, layer and K or V. A given
    `profile` (or the path of one) is not charged, as KVTC's basis is not (its size:
    `CacheGenProfile.nbytes`). Without one the symbols are counted in the chunk and the
    counts, DEFLATEd, travel with it.
    Departures: the bin widths are read as multiples of the root mean square of the
    token's delta; the authors' code has no deltas to settle their unit. Normal noise
    then takes 3.1 bits per element with a profile, and caches less, where the paper
    reports about 2. Deltas are taken to the anchor as restored, so that errors do not
    add up. The range coder is `constriction`'s, one stream for all channels of K or of V.
    Streaming and the choice of a level by bandwidth are no part of the format.
    """

    name = "cachegen"
    source = "CacheGen, arXiv 2310.07240: groups of 10 tokens, bins 0.5 / 1 / 1.5 by layer third"
    settings: ClassVar[Settings] = {"bins": Setting(1.0, 0.1, 10)}

    def __init__(
        self,
        geometry: Geometry,
        dtype: torch.dtype,
        ropes: Sequence[Rope | None] = (),
        *,
        profile: CacheGenProfile | str | None = None,
        **given: float,
    ) -> None:
        super().__init__(geometry, dtype, ropes, **given)
        self._bins = self.values["bins"]
        # A path, because the options of a run are JSON.
        self.profile = CacheGenProfile.load(Path(profile)) if isinstance(profile, str) else profile

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        parts: list[bytes] = []
        for kind, x in zip(KINDS, (k, v), strict=True):
            anchors, deltas = quantize(x.flatten(2).float(), self._bins)
            if self.profile is None:
                counts = SymbolCounts.of(anchors, deltas, self._bins)
                parts += counts.to_bytes()
            else:
                counts = self.profile.counts[kind]
            for symbols, table in ((anchors, counts.anchors), (deltas, counts.deltas)):
                parts += [
                    to_bytes(symbols.scale),
                    encode_columns(symbols.values.flatten(1), probabilities(table)),
                ]
        return parts

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        half = len(parts) // 2
        return (
            self._restore("k", parts[:half], tokens, self.geometry.head_size),
            self._restore("v", parts[half:], tokens, self.geometry.head_size_v),
        )

    def _restore(
        self, kind: Kind, parts: Sequence[memoryview], tokens: int, head_size: int
    ) -> torch.Tensor:
        g = self.geometry
        if self.profile is None:
            channels = g.num_kv_heads * head_size
            counts = SymbolCounts.from_bytes(parts[0], parts[1], channels, self._bins)
        else:
            counts = self.profile.counts[kind]
        anchor_scale, anchors, delta_scale, deltas = parts[-_SECTION_PARTS:]
        first = anchor_count(tokens)
        rows = dequantize(
            _decode(anchors, anchor_scale, counts.anchors, first),
            _decode(deltas, delta_scale, counts.deltas, tokens - first),
            self._bins,
        )
        return to_cache(rows.view(tokens, -1, g.num_kv_heads, head_size), self.dtype)


def _decode(data: memoryview, scale: memoryview, counts: torch.Tensor, count: int) -> Symbols:
    """Symbols [count, L, C] of one stream."""
    layers, channels, _ = counts.shape
    columns = decode_columns(data, probabilities(counts), count)
    return Symbols(
        columns.view(count, layers, channels),
        from_bytes(scale, torch.float16, (count, layers)),
    )
