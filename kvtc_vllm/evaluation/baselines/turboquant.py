"""TurboQuant: every head's vector rotated at random, and a scalar codebook for its coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import ClassVar

import numpy as np
import torch

from kvtc_vllm.codec.quantizers.base import to_fp16
from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.evaluation.baselines.base import Baseline
from kvtc_vllm.evaluation.baselines.formats import (
    from_bytes,
    pack_positions,
    to_cache,
    unpack_positions,
)

PARTS = 2
"""Byte strings of a set of vectors: codes, norms."""
_SEED = 0
_GRID = 1 << 16
_ITERATIONS = 2000


class TurboQuant(Baseline):
    """TurboQuant (arXiv 2504.19874), the version for least squared error, keys and values alike.

    Followed: a vector of one token and head is divided by its norm and rotated by one random
    orthogonal matrix; each coordinate gets the nearest of 2^b values, which are the Lloyd-Max
    codebook of a coordinate of a random unit vector; reading back undoes the rotation and gives
    the norm again. Post-RoPE keys. From vLLM's version: what is read back is scaled to the stored
    norm, which the codebook alone makes too small.
    Charged: b bits per element and a float16 norm per vector. The rotation and the codebook are
    of the method, not of a prompt, and cost nothing.
    Departures: no second step of one bit (QJL), which removes the bias of inner products and
    takes a bit from the codebook: vLLM leaves it out as well, as harmful behind a softmax. No
    layer is exempt, as in the paper; vLLM keeps the first two and the last two in 16 bits. All
    channels have the same bits, as in vLLM; the paper's results on LongBench give more to outliers
    (`turboquant_outliers.py`). vLLM codes only keys so, with a Hadamard matrix as the rotation and
    the codebook of a normal variable; it quantises values uniformly, with a zero point and a scale
    per vector, which is two bytes more than a norm.
    """

    source = "TurboQuant, arXiv 2504.19874: random rotation, Lloyd-Max codebook, float16 norms"
    bits: ClassVar[int]

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        return [part for x in (k, v) for part in code_vectors(x.float(), self.bits)]

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.geometry
        outer = (tokens, g.num_layers, g.num_kv_heads)
        k = read_vectors(parts[:PARTS], (*outer, g.head_size), self.bits)
        v = read_vectors(parts[PARTS:], (*outer, g.head_size_v), self.bits)
        return to_cache(k, self.dtype), to_cache(v, self.dtype)


class TurboQuant4(TurboQuant):
    """TurboQuant at 4 bits."""

    name = "turboquant-4bit"
    bits = 4


class TurboQuant3(TurboQuant):
    """TurboQuant at 3 bits."""

    name = "turboquant-3bit"
    bits = 3


def code_vectors(x: torch.Tensor, bits: int) -> list[bytes]:
    """float32 [..., D], vectors along the last dimension -> `PARTS` byte strings."""
    size = x.shape[-1]
    norms = to_fp16(x.norm(dim=-1))
    unit = x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    codebook = codebook_of(size, bits)
    borders = (codebook[1:] + codebook[:-1]) / 2
    codes = torch.bucketize(unit @ rotation_of(size), borders)
    return [pack_positions(codes, len(codebook)), to_bytes(norms)]


def read_vectors(parts: Sequence[memoryview], shape: tuple[int, ...], bits: int) -> torch.Tensor:
    """Inverse of `code_vectors`: float32 of the given shape [..., D]."""
    codebook = codebook_of(shape[-1], bits)
    rotated = codebook[unpack_positions(parts[0], len(codebook), shape)]
    norms = from_bytes(parts[1], torch.float16, shape[:-1]).float()
    scale = norms / rotated.norm(dim=-1)
    return (rotated * scale.unsqueeze(-1)) @ rotation_of(shape[-1]).T


@cache
def rotation_of(size: int) -> torch.Tensor:
    """A random orthogonal matrix, float32 [size, size], always the same."""
    normal = torch.randn(size, size, generator=torch.Generator().manual_seed(_SEED)).double()
    basis, triangle = torch.linalg.qr(normal)
    return (basis * triangle.diagonal().sign()).float()


@cache
def codebook_of(size: int, bits: int) -> torch.Tensor:
    """Lloyd-Max values for a coordinate of a random unit vector: float32 [2**bits], rising.

    The coordinate's density is proportional to (1 - x^2)^((size - 3) / 2).
    """
    grid = (np.arange(_GRID) + 0.5) * (2 / _GRID) - 1
    weight = (1 - grid**2) ** ((size - 3) / 2)
    mass = np.concatenate(([0.0], weight.cumsum()))
    moment = np.concatenate(([0.0], (weight * grid).cumsum()))
    # To begin with, as many draws for one value as for another.
    shares = (np.arange(2**bits) + 0.5) / 2**bits
    values = grid[np.searchsorted(mass[1:], shares * mass[-1])]
    for _ in range(_ITERATIONS):
        inner = np.searchsorted(grid, (values[1:] + values[:-1]) / 2)
        edges = np.concatenate(([0], inner, [_GRID]))
        new = np.diff(moment[edges]) / np.diff(mass[edges])
        if np.abs(new - values).max() < 1e-9:
            break
        values = new
    return torch.from_numpy(values).float()
