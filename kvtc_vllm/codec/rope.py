"""Exact inverse and forward rotary embedding from a cos/sin table.

The table is the model's own (vLLM's `cos_sin_cache`), already rounded to the
model dtype and already multiplied by any attention scaling (YaRN's mscale), so
cos^2 + sin^2 is not 1. The inverse therefore divides by that determinant:
with float32 in between, inverse followed by forward gives back the stored
bf16 keys bit for bit in all but about one element in 10^5 (reference: vLLM
`RotaryEmbedding.forward_native`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import xxhash


@dataclass(frozen=True)
class Rope:
    """One rotary embedding.

    cos_sin: [max_positions, rotary_dim], cat(cos, sin) along the last
    dimension, each half rotary_dim / 2 wide, any float dtype.
    neox: True rotates (i, i + rotary_dim/2) pairs, False (GPT-J order)
    rotates (2i, 2i+1) pairs. Dimensions past rotary_dim pass through.
    """

    cos_sin: torch.Tensor
    neox: bool = True

    @property
    def rotary_dim(self) -> int:
        return int(self.cos_sin.shape[1])

    @property
    def max_positions(self) -> int:
        return int(self.cos_sin.shape[0])

    def fingerprint(self) -> bytes:
        """16 bytes over the exact table and the pairing order."""
        h = xxhash.xxh3_128()
        h.update(b"neox" if self.neox else b"gptj")
        h.update(str((self.cos_sin.dtype, tuple(self.cos_sin.shape))).encode())
        h.update(self.cos_sin.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return h.digest()

    def apply(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate pre-RoPE keys.

        keys: [T, ..., head_size]; positions: int [T]. Returns float32.
        """
        cos, sin = self._angles(keys, positions)
        x1, x2 = self._split(keys.float())
        return self._join(x1 * cos - x2 * sin, x2 * cos + x1 * sin, keys)

    def invert(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Undo `apply` exactly: post-RoPE keys [T, ..., head_size] -> float32 pre-RoPE."""
        cos, sin = self._angles(keys, positions)
        y1, y2 = self._split(keys.float())
        det = cos * cos + sin * sin
        return self._join((y1 * cos + y2 * sin) / det, (y2 * cos - y1 * sin) / det, keys)

    def _angles(
        self, keys: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if positions.numel() and int(positions[-1]) >= self.max_positions:
            raise ValueError(
                f"position {int(positions[-1])} is outside the RoPE table of "
                f"{self.max_positions} positions"
            )
        table = self.cos_sin.to(keys.device)[positions.to(keys.device)].float()
        shape = (table.shape[0],) + (1,) * (keys.dim() - 2) + (self.rotary_dim // 2,)
        cos, sin = table.chunk(2, dim=-1)
        return cos.reshape(shape), sin.reshape(shape)

    def _split(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rotated = keys[..., : self.rotary_dim]
        if self.neox:
            first, second = rotated.chunk(2, dim=-1)
            return first, second
        return rotated[..., 0::2], rotated[..., 1::2]

    def _join(self, first: torch.Tensor, second: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        if self.neox:
            rotated = torch.cat((first, second), dim=-1)
        else:
            rotated = torch.stack((first, second), dim=-1).flatten(-2)
        if self.rotary_dim == keys.shape[-1]:
            return rotated
        return torch.cat((rotated, keys[..., self.rotary_dim :].float()), dim=-1)


def rope_spans(ropes: Sequence[Rope | None]) -> Iterator[tuple[int, int, Rope | None]]:
    """Longest spans (first, end, rope) of neighbouring layers that share a rotation.

    ropes: one entry per layer, None for a layer whose keys are not rotated.
    """
    first = 0
    for _, members in groupby(ropes, key=id):
        span = list(members)
        yield first, first + len(span), span[0]
        first += len(span)
