"""ThinK: channels of the keys that queries hardly use are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.evaluation.baselines.fitted import FittedBaseline
from kvtc_vllm.evaluation.baselines.formats import (
    PARTS,
    dequantize_groups,
    from_bytes,
    quantize_groups,
    to_cache,
)
from kvtc_vllm.evaluation.baselines.kivi import GROUP, Kivi
from kvtc_vllm.evaluation.settings import Setting, Settings


class Think(FittedBaseline):
    """ThinK (arXiv 2407.21018), 40 % of the key channels pruned (setting `pruned`, the paper's
    most common one), values as they are.

    Followed: per head, channel j of post-RoPE keys has the score |q_j| |k_j|, the Frobenius norm
    of the product of that channel's queries and keys; the channels of the lowest scores are
    dropped for the whole prompt and read back as 0. The newest tokens keep all channels: they are
    the replay's window.
    Charged: the kept channels and the values in the cache dtype, and a bit per channel and head.
    Departures: the paper takes the queries of the prompt's last 32 tokens; what is stored here
    has no queries, so |q_j| is the root mean square over calibration prompts. Query heads that
    share a KV head choose together; the authors' code (github.com/SalesforceAIResearch/ThinK)
    repeats a KV head for each of its query heads before it chooses and stores.
    """

    name = "think-40"
    source = "ThinK, arXiv 2407.21018: 40 % of the key channels pruned"
    whole_prompt = True
    settings: ClassVar[Settings] = {"pruned": Setting(0.4, 0, 0.95)}

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        kept = self._kept_channels(k)
        return [_to_mask(kept, k.shape[-1]), to_bytes(_channels(k, kept)), to_bytes(v)]

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.geometry
        kept = self._from_mask(parts[0])
        layer = (tokens, g.num_layers, g.num_kv_heads)
        k = from_bytes(parts[1], self.dtype, (*layer, kept.shape[-1]))
        v = from_bytes(parts[2], self.dtype, (*layer, g.head_size_v))
        return self._widened(k, kept), v.clone()

    def _kept_channels(self, k: torch.Tensor) -> torch.Tensor:
        """Channels with the highest scores, rising: int64 [L, H, kept]."""
        used = self.statistics.queries.diagonal(dim1=-2, dim2=-1)
        scores = used * k.double().square().sum(dim=0)
        # Of equals the first stays.
        order = scores.argsort(dim=-1, descending=True, stable=True)
        return order[..., : self._count()].sort(dim=-1).values

    def _count(self) -> int:
        return max(1, round((1 - self.values["pruned"]) * self.geometry.head_size))

    def _widened(self, k: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        whole = k.new_zeros(*k.shape[:-1], self.geometry.head_size)
        return whole.scatter_(-1, kept.expand(*k.shape[:-1], -1), k)

    def _from_mask(self, data: memoryview) -> torch.Tensor:
        g = self.geometry
        outer = (g.num_layers, g.num_kv_heads)
        count = g.num_layers * g.num_kv_heads * g.head_size
        bits = np.unpackbits(np.array(data, dtype=np.uint8), count=count)
        channels = bits.reshape(-1, g.head_size).nonzero()[1]
        return torch.from_numpy(channels.astype(np.int64)).reshape(*outer, self._count())


class ThinkKivi(Think):
    """ThinK on KIVI, as the paper's section on quantisation: the kept channels in 2 bits.

    Followed: `Think` chooses channels, `Kivi` quantises what is left, keys per channel in groups
    of 32 tokens, values per token.
    Charged: what `Kivi` charges, for fewer key channels, and a bit per channel and head.
    Departures: those of both.
    """

    name = "think-40-kivi"
    source = "ThinK on KIVI, arXiv 2407.21018: 40 % of the key channels pruned, 2 bits, group 32"

    def prepare(self) -> None:
        Kivi(self.geometry, self.dtype)  # which refuses heads that are no whole groups

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        kept = self._kept_channels(k)
        narrow = _channels(k, kept)
        whole = len(k) // GROUP * GROUP
        groups = narrow[:whole].float().reshape(-1, GROUP, *narrow.shape[1:]).movedim(1, -1)
        return [
            _to_mask(kept, k.shape[-1]),
            *quantize_groups(groups),
            to_bytes(narrow[whole:]),
            *quantize_groups(v.float().reshape(*v.shape[:-1], v.shape[-1] // GROUP, GROUP)),
        ]

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.geometry
        layer = (g.num_layers, g.num_kv_heads)
        whole, rest = divmod(tokens, GROUP)
        kept = self._from_mask(parts[0])
        count = kept.shape[-1]
        groups = dequantize_groups(parts[1 : 1 + PARTS], (whole, *layer, count, GROUP))
        tail = from_bytes(parts[1 + PARTS], self.dtype, (rest, *layer, count))
        values = dequantize_groups(
            parts[2 + PARTS :], (tokens, *layer, g.head_size_v // GROUP, GROUP)
        )
        narrow = torch.cat((to_cache(groups.movedim(-1, 1).flatten(0, 1), self.dtype), tail))
        return self._widened(narrow, kept), to_cache(values.flatten(-2), self.dtype)


def _channels(k: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Channels [L, H, kept] of keys [T, L, H, D] -> [T, L, H, kept]."""
    return k.gather(-1, kept.expand(len(k), *kept.shape))


def _to_mask(kept: torch.Tensor, size: int) -> bytes:
    mask = torch.zeros(*kept.shape[:-1], size, dtype=torch.uint8).scatter_(-1, kept, 1)
    return np.packbits(mask.numpy()).tobytes()
