"""Symbol distributions of CacheGen, counted once per model."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from kvtc_vllm.codec.artifact import KINDS, Kind
from kvtc_vllm.codec.shuffle import shuffle, unshuffle
from kvtc_vllm.evaluation.baselines.cachegen_codes import (
    ANCHOR_SYMBOLS,
    Symbols,
    delta_symbols,
    quantize,
)
from kvtc_vllm.evaluation.baselines.entropy import histogram

PRIOR_TOKENS = 8.0
"""Weight of the layer's pooled distribution in that of a channel, in tokens: what
the channel itself has rarely or never shown is not yet impossible."""

_NAMES = ("anchors", "deltas")


@dataclass(frozen=True)
class SymbolCounts:
    """How often each symbol occurred in each channel of K or of V.

    anchors, deltas: int32 [L, C, symbols].
    """

    anchors: torch.Tensor
    deltas: torch.Tensor

    @classmethod
    def of(cls, anchors: Symbols, deltas: Symbols, bins: float = 1.0) -> SymbolCounts:
        """bins: as symbols were quantised with."""
        channels = anchors.values.shape[-1]
        return cls(
            _count(anchors.values, ANCHOR_SYMBOLS),
            _count(deltas.values, delta_symbols(channels, bins)),
        )

    def to_bytes(self) -> list[bytes]:
        """For a chunk that carries its own counts, which are mostly zeros: DEFLATEd byte planes."""
        return [zlib.compress(b"".join(shuffle(x))) for x in (self.anchors, self.deltas)]

    @classmethod
    def from_bytes(
        cls, anchors: memoryview, deltas: memoryview, channels: int, bins: float = 1.0
    ) -> SymbolCounts:
        """Inverse of `to_bytes`."""
        return cls(
            _inflate(anchors, channels, ANCHOR_SYMBOLS),
            _inflate(deltas, channels, delta_symbols(channels, bins)),
        )


@dataclass(frozen=True)
class CacheGenProfile:
    """Symbol counts of keys and values of one model."""

    counts: dict[Kind, SymbolCounts]

    @classmethod
    def fit(cls, k: torch.Tensor, v: torch.Tensor, bins: float = 1.0) -> CacheGenProfile:
        """From K [T, L, H, D] (post-RoPE) and V [T, L, H, Dv] of one run of consecutive tokens."""
        return cls(
            {
                kind: SymbolCounts.of(*quantize(x.flatten(2).float(), bins), bins)
                for kind, x in zip(KINDS, (k, v), strict=True)
            }
        )

    def __add__(self, other: CacheGenProfile) -> CacheGenProfile:
        """Counts of both: profiles of several prompts add up to one."""
        return CacheGenProfile(
            {
                kind: SymbolCounts(
                    mine.anchors + other.counts[kind].anchors,
                    mine.deltas + other.counts[kind].deltas,
                )
                for kind, mine in self.counts.items()
            }
        )

    def nbytes(self) -> int:
        """Size of the tables in memory and on disk, which no chunk is charged for."""
        return sum(x.nbytes for x in self._tensors().values())

    def save(self, path: Path) -> None:
        save_file(self._tensors(), path)

    @classmethod
    def load(cls, path: Path) -> CacheGenProfile:
        """Inverse of `save`."""
        stored = load_file(path)
        return cls(
            {kind: SymbolCounts(*(stored[f"{kind}.{name}"] for name in _NAMES)) for kind in KINDS}
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{kind}.{name}": getattr(counts, name)
            for kind, counts in self.counts.items()
            for name in _NAMES
        }


def probabilities(counts: torch.Tensor) -> npt.NDArray[np.float32]:
    """Counts [L, C, symbols] -> float32 [L * C, symbols], proportional to the probabilities."""
    exact = counts.double()
    pooled = exact.sum(dim=1, keepdim=True) + 1.0
    smooth = exact + PRIOR_TOKENS * pooled / pooled.sum(dim=-1, keepdim=True)
    return smooth.float().flatten(0, 1).numpy()


def _count(symbols: torch.Tensor, size: int) -> torch.Tensor:
    """[n, L, C] -> int32 [L, C, size]."""
    return histogram(symbols.flatten(1), size).int().view(*symbols.shape[1:], size)


def _inflate(data: memoryview, channels: int, symbols: int) -> torch.Tensor:
    """DEFLATEd byte planes -> int32 [L, C, symbols]."""
    planes = torch.frombuffer(bytearray(zlib.decompress(data)), dtype=torch.uint8)
    return unshuffle(planes, torch.int32).view(-1, channels, symbols)
