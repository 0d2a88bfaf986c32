"""SWAN: every head's vector rotated to a basis of the model, its small coordinates dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from kvtc_vllm.codec.quantizers.fp8 import E4M3_MAX
from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.evaluation.baselines.fitted import FittedBaseline
from kvtc_vllm.evaluation.baselines.formats import from_bytes, sixteen_bit, to_cache
from kvtc_vllm.evaluation.baselines.statistics import leading
from kvtc_vllm.evaluation.settings import Setting, Settings


class Swan(FittedBaseline):
    """SWAN (arXiv 2511.18936) with half of the coordinates (setting `kept`, their share).

    Followed: per layer and head an orthogonal matrix is found offline; keys (with RoPE) and
    values are rotated by it, and of each token's vector the largest coordinates are kept, the
    others read as 0. That of keys comes from queries and keys together. The paper's dense buffer
    of 128 tokens is the replay's window.
    Charged: the kept coordinates, and a bit per coordinate that tells which. The paper stores
    indices of a byte, which is more. The rotation is of the model.
    Departures: the paper's matrix for values also sees the output projection, here they alone
    make it. Queries and keys weigh alike in that of keys, whatever their norms. The paper attends
    to the sparse form itself; here it is read back first.
    """

    coordinate: ClassVar[torch.dtype | None]
    """How a coordinate is stored; None: in 16 bits."""
    settings: ClassVar[Settings] = {"kept": Setting(0.5, 0.01, 1)}

    def prepare(self) -> None:
        known = self.statistics
        joint = _share(known.queries) + _share(known.keys)
        self._rotations = (
            leading(joint, self.geometry.head_size),
            leading(known.values, self.geometry.head_size_v),
        )

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        pairs = zip((k, v), self._rotations, strict=True)
        return [part for x, rotation in pairs for part in self._compress(x.float(), rotation)]

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k = self._restore(parts[:2], tokens, self._rotations[0])
        return k, self._restore(parts[2:], tokens, self._rotations[1])

    def _compress(self, x: torch.Tensor, rotation: torch.Tensor) -> list[bytes]:
        """float32 [T, L, H, D] -> which coordinates, and those."""
        rotated = torch.einsum("tlhd,lhde->tlhe", x, rotation)
        order = rotated.abs().argsort(dim=-1, descending=True, stable=True)
        kept = order[..., : self._count(x.shape[-1])].sort(dim=-1).values
        mask = torch.zeros(rotated.shape, dtype=torch.uint8).scatter_(-1, kept, 1)
        return [
            np.packbits(mask.numpy()).tobytes(),
            to_bytes(self._stored(rotated.gather(-1, kept))),
        ]

    def _restore(
        self, parts: Sequence[memoryview], tokens: int, rotation: torch.Tensor
    ) -> torch.Tensor:
        """Inverse of `_compress`, in the cache dtype."""
        layers, heads, size, _ = rotation.shape
        outer = (tokens, layers, heads)
        bits = np.unpackbits(
            np.array(parts[0], dtype=np.uint8), count=tokens * layers * heads * size
        )
        kept = bits.reshape(-1, size).nonzero()[1].astype(np.int64)
        shape = (*outer, self._count(size))
        stored = self.coordinate or sixteen_bit(self.dtype)
        values = from_bytes(parts[1], stored, shape).float()
        rotated = torch.zeros(*outer, size).scatter_(
            -1, torch.from_numpy(kept).reshape(shape), values
        )
        return to_cache(torch.einsum("tlhe,lhde->tlhd", rotated, rotation), self.dtype)

    def _count(self, size: int) -> int:
        return max(1, round(self.values["kept"] * size))

    def _stored(self, x: torch.Tensor) -> torch.Tensor:
        if self.coordinate is None:
            return to_cache(x, sixteen_bit(self.dtype))
        return x.clamp(-E4M3_MAX, E4M3_MAX).to(self.coordinate)


class Swan16(Swan):
    """Coordinates in 16 bits."""

    name = "swan-16bit"
    source = "SWAN, arXiv 2511.18936: half of the rotated coordinates, 16 bits"
    coordinate = None


class Swan8(Swan):
    """Coordinates in 8 bits (E4M3), the paper's smaller form."""

    name = "swan-8bit"
    source = "SWAN, arXiv 2511.18936: half of the rotated coordinates, 8 bits"
    coordinate = torch.float8_e4m3fn


def _share(moments: torch.Tensor) -> torch.Tensor:
    """Moments of each head over their trace, so that queries and keys weigh alike."""
    trace = moments.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return moments / trace.clamp_min(torch.finfo(trace.dtype).tiny)[..., None, None]
