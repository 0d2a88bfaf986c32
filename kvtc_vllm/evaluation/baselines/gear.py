"""GEAR: groups of 2 or 4 bits, a low-rank approximation of their error, and exact outliers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from kvtc_vllm.codec.quantizers.uniform import INT2, INT4, UniformQuantizer
from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.evaluation.baselines.base import Baseline
from kvtc_vllm.evaluation.baselines.formats import (
    PARTS,
    dequantize_groups,
    from_bytes,
    low_rank,
    pack_positions,
    quantize_groups,
    sixteen_bit,
    to_cache,
    to_sixteen_bit,
    unpack_positions,
)
from kvtc_vllm.evaluation.settings import Setting, Settings

GROUP = 64

_SECTION_PARTS = PARTS + 4


class Gear(Baseline):
    """GEAR (arXiv 2403.05527), KIVI backbone, 2 bits, with the settings of the KVTC paper.

    Followed: groups of 64 (keys per channel along the tokens, values per token along
    the concatenated heads); before quantising, the largest 1 % and the smallest 1 % of
    every vector (a channel's keys, a token's values) are replaced by the vector's mean
    and kept in 16 bits (setting `outliers`, the share of both); rank 4 per head (setting
    `rank`, the prefill rank) for what the groups leave.
    Keys post-RoPE. GEAR's full-precision buffer of 64 tokens is the replay's window.
    Charged: 2 bits per element and 32 bits per group; both low-rank factors in float16;
    16 bits an outlier and its position in the vector in ceil(log2(vector length)) bits;
    the last T mod 64 tokens' keys in the cache dtype.
    Outliers: the KVTC paper names group, gap and ranks but no outlier share, and lists
    GEAR at 5x. For heads of 128 and long prompts the 2 % of GEAR's paper come to 4.5x
    and none (GEAR-L) to 5.3x, so both may be its "5x"; the default is the better
    quality. Heads of 64 pay twice as much for the same rank: 4.0x and 4.5x at 900 tokens.
    Departures, all in GEAR's favour: exact leading singular vectors instead of three
    power iterations; outliers come back exactly, where the reference code adds the
    low-rank term to them; group parameters are rounded to float16 before the codes are
    computed.
    """

    name = "gear-2bit"
    source = "GEAR, arXiv 2403.05527: KIVI backbone, 2 bits, group 64, rank 4, 2 % outliers"
    whole_prompt = True
    quantizer: ClassVar[UniformQuantizer] = INT2
    settings: ClassVar[Settings] = {
        "rank": Setting(4, 1, 64, whole=True),
        # Zero is the paper's GEAR-L; see above for what both cost.
        "outliers": Setting(0.02, 0, 0.5),
    }

    def prepare(self) -> None:
        self._rank = int(self.values["rank"])
        self._value_channels = self.geometry.num_kv_heads * self.geometry.head_size_v
        if self._value_channels % GROUP:
            raise ValueError(
                f"{self._value_channels} values per token are no whole groups of {GROUP}"
            )

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        whole = len(k) - len(k) % GROUP
        return [
            *self._compress(_key_vectors(k[:whole].float()), keys=True),
            to_bytes(k[whole:]),
            *self._compress(v.float().flatten(2), keys=False),
        ]

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.geometry
        layer = (g.num_layers, g.num_kv_heads)
        rest = tokens % GROUP
        keys = self._restore(
            parts[:_SECTION_PARTS], (*layer, g.head_size, tokens - rest), keys=True
        )
        tail = from_bytes(parts[_SECTION_PARTS], self.dtype, (rest, *layer, g.head_size))
        values = self._restore(
            parts[_SECTION_PARTS + 1 :], (tokens, g.num_layers, self._value_channels), keys=False
        )
        k = to_cache(keys.movedim(-1, 0), self.dtype)
        v = values.view(tokens, *layer, g.head_size_v)
        return torch.cat((k, tail)), to_cache(v, self.dtype)

    def _compress(self, vectors: torch.Tensor, keys: bool) -> list[bytes]:
        """float32 [..., n], outliers and groups along the last dimension -> byte strings."""
        positions = self._outliers(vectors)
        outliers = to_sixteen_bit(vectors.gather(-1, positions), self.dtype)
        mean = vectors.mean(dim=-1, keepdim=True).expand_as(positions)
        inliers = vectors.scatter(-1, positions, mean)
        groups = quantize_groups(_split(inliers), self.quantizer)
        base = dequantize_groups(
            [memoryview(x) for x in groups], _split(inliers).shape, self.quantizer
        )
        error = (inliers - base.flatten(-2)).scatter_(-1, positions, 0.0)
        heads = self._heads(error, keys)
        left, right = low_rank(heads, rank_of(heads.shape[-2], self._rank))
        return [
            *groups,
            to_bytes(left),
            to_bytes(right),
            pack_positions(positions, vectors.shape[-1]),
            to_bytes(outliers),
        ]

    def _restore(
        self, parts: Sequence[memoryview], shape: tuple[int, ...], keys: bool
    ) -> torch.Tensor:
        """Inverse of `_compress`: float32 of the given shape."""
        *outer, length = shape
        shape_of_groups = (*outer, length // GROUP, GROUP)
        base = dequantize_groups(parts[:PARTS], shape_of_groups, self.quantizer).flatten(-2)
        left, right, positions, outliers = parts[PARTS:]
        layers, heads, tokens, size = self._heads(base, keys).shape
        rank = rank_of(tokens, self._rank)
        correction = (
            from_bytes(left, torch.float16, (layers, heads, tokens, rank)).float()
            @ from_bytes(right, torch.float16, (layers, heads, rank, size)).float()
        )
        # `_heads` is a view, so this adds to `base`.
        self._heads(base, keys).add_(correction)
        count = (*outer, 2 * self._outliers_an_end(length))
        values = from_bytes(outliers, sixteen_bit(self.dtype), count).float()
        return base.scatter_(-1, unpack_positions(positions, length, count), values)

    def _heads(self, vectors: torch.Tensor, keys: bool) -> torch.Tensor:
        """View [L, H, T, D] of keys' vectors [L, H, D, T] or values' vectors [T, L, H * Dv]."""
        if keys:
            return vectors.mT
        heads = (self.geometry.num_kv_heads, self.geometry.head_size_v)
        return vectors.view(*vectors.shape[:2], *heads).permute(1, 2, 0, 3)

    def _outliers_an_end(self, length: int) -> int:
        return int(length * self.values["outliers"] / 2)

    def _outliers(self, vectors: torch.Tensor) -> torch.Tensor:
        """Positions of the largest and the smallest elements: int64 [..., 2 * count]."""
        count = self._outliers_an_end(vectors.shape[-1])
        return torch.cat(
            [vectors.topk(count, dim=-1, largest=end).indices for end in (True, False)], dim=-1
        )


class Gear4(Gear):
    """GEAR on 4-bit KIVI, the paper's other width: as `Gear`, with 4 bits per element."""

    name = "gear-4bit"
    source = "GEAR, arXiv 2403.05527: KIVI backbone, 4 bits, group 64, rank 4, 2 % outliers"
    quantizer = INT4


def rank_of(tokens: int, wanted: int) -> int:
    """Rank of a head: never more than its rows have."""
    return min(wanted, tokens)


def _key_vectors(k: torch.Tensor) -> torch.Tensor:
    """[T, L, H, D] -> [L, H, D, T]."""
    return k.movedim(0, -1).contiguous()


def _split(vectors: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [..., n / GROUP, GROUP]."""
    return vectors.view(*vectors.shape[:-1], vectors.shape[-1] // GROUP, GROUP)
