"""TurboQuant with more bits for outlier channels, as in its paper's tables of KV caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from kvtc_vllm.evaluation.baselines.base import Baseline
from kvtc_vllm.evaluation.baselines.formats import to_cache
from kvtc_vllm.evaluation.baselines.turboquant import PARTS, code_vectors, read_vectors

_LEAST_CHANNELS = 3
"""A coordinate of a unit vector of fewer has no density with a peak inside."""
_SECTION_PARTS = 1 + 2 * PARTS


class TurboQuantOutliers(Baseline):
    """TurboQuant (arXiv 2504.19874, section 4.3): two instances, for outliers and for the rest.

    Followed: the channels of a head are in two sets, and each set is quantised by `TurboQuant` on
    its own, with a norm, a rotation and a codebook of its size; outliers get a bit more.
    Charged: codes, two float16 norms per vector, and a bit per channel, layer and head that tells
    its set, per chunk.
    Departures: the paper does not say how outliers are found; here they are the channels of the
    largest mean square in the chunk, for each layer and head. It calls 32 of 128 channels at 3 bits
    and 96 at 2 bits "2.5 bits", which are 2.25. Of "3.5 bits" it says that the shares are others;
    here half of the channels have 4 bits and half 3. Heads of 64 pay twice as much for norms.
    The other departures are those of `TurboQuant`.
    """

    bits: ClassVar[tuple[int, int]]
    """Of an outlier's code, and of another channel's."""
    divisor: ClassVar[int]
    """One in so many channels is an outlier."""

    def prepare(self) -> None:
        for size in (self.geometry.head_size, self.geometry.head_size_v):
            if size // self.divisor < _LEAST_CHANNELS:
                raise ValueError(f"a head of {size} elements is too small to be split")

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        return [part for x in (k, v) for part in self._compress(x.float())]

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.geometry
        k = self._restore(parts[:_SECTION_PARTS], tokens, g.head_size)
        v = self._restore(parts[_SECTION_PARTS:], tokens, g.head_size_v)
        return to_cache(k, self.dtype), to_cache(v, self.dtype)

    def _compress(self, x: torch.Tensor) -> list[bytes]:
        """float32 [T, L, H, D] -> which channels are outliers, codes and norms of both sets."""
        energy = x.double().square().mean(dim=0)
        # Of equals the first is an outlier.
        order = energy.argsort(dim=-1, descending=True, stable=True)
        outliers = order[..., : x.shape[-1] // self.divisor]
        mask = torch.zeros(energy.shape, dtype=torch.uint8).scatter_(-1, outliers, 1)
        parts = [np.packbits(mask.numpy()).tobytes()]
        for channels, bits in zip(_channels(mask), self.bits, strict=True):
            parts += code_vectors(x.gather(-1, channels.expand(len(x), -1, -1, -1)), bits)
        return parts

    def _restore(self, parts: Sequence[memoryview], tokens: int, size: int) -> torch.Tensor:
        """Inverse of `_compress`: float32 [tokens, L, H, size]."""
        outer = (self.geometry.num_layers, self.geometry.num_kv_heads)
        bits = np.unpackbits(
            np.array(parts[0], dtype=np.uint8), count=outer[0] * outer[1] * size
        ).reshape(*outer, size)
        x = torch.empty(tokens, *outer, size)
        for number, channels in enumerate(_channels(torch.from_numpy(bits))):
            own = parts[1 + number * PARTS : 1 + (number + 1) * PARTS]
            vectors = read_vectors(own, (tokens, *channels.shape), self.bits[number])
            x.scatter_(-1, channels.expand(tokens, -1, -1, -1), vectors)
        return x


class TurboQuant25(TurboQuantOutliers):
    """The paper's numbers for what it calls 2.5 bits."""

    name = "turboquant-2.5bit"
    source = "TurboQuant, arXiv 2504.19874: a quarter of the channels in 3 bits, the others in 2"
    bits = (3, 2)
    divisor = 4


class TurboQuant35(TurboQuantOutliers):
    """3.5 bits."""

    name = "turboquant-3.5bit"
    source = "TurboQuant, arXiv 2504.19874: half of the channels in 4 bits, the others in 3"
    bits = (4, 3)
    divisor = 2


def _channels(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outlier channels and others, rising: int64 [L, H, n] of a mask [L, H, D] with as many
    outliers in every head."""
    order = mask.argsort(dim=-1, descending=True, stable=True)
    count = int(mask[0, 0].sum())
    return order[..., :count], order[..., count:]
