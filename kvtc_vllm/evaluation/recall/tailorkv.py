"""TailorKV: layers that look at many tokens are quantised, in the others a query reads a few."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch

from kvtc_vllm.codec.quantizers.base import to_fp16
from kvtc_vllm.evaluation.eviction.base import Attention
from kvtc_vllm.evaluation.recall.base import STORED_BYTES, Recall, RecalledLayer, cache_bytes
from kvtc_vllm.evaluation.settings import KEEP, Setting, Settings

GROUP = 64
"""Elements that share a scale: tokens of a key channel, channels of a value."""
DOMINANT = 0.05
"""Share of the tokens whose attention tells the kinds of layer apart."""
PARAMETER_BYTES = 4
"""Zero point and scale of a group, float16 each."""


class TailorKV(Recall):
    """TailorKV (arXiv 2505.19586): 1-bit layers, and recall of 1/8 of the tokens in the others.

    Followed: a layer is friendly to quantisation where the newest 32 queries give more than 0.2
    of their attention (setting `dense`) to other tokens than their top 5 %. There all tokens are
    quantised in 1 bit (setting `bits`), asymmetric between minimum and maximum, groups of 64: keys
    per channel, values per token. In other layers the first 8 tokens (setting `sinks`) are always
    read. A query is averaged over the heads that share a KV head; 8 channels (setting `channels`)
    are taken by |query| times the channel's largest |key|, and the tokens with the best products
    over those channels are read.
    Charged as stored: codes and a float16 zero point and scale per group where quantised, with
    what is no whole group of keys in 16 bits; K and V of all tokens elsewhere. Charged as read: the
    same where quantised; elsewhere the chosen channels of all keys, and K and V of the tokens
    chosen.
    Departures: kinds of layer are told for each stored prefix, where the authors tell them once on
    one prompt; attention is averaged over the query heads of a KV head for it. Channels are chosen
    with the query itself, where the authors fetch them ahead with a guess from the layer before;
    this favours the method. The authors' budget is 192 tokens whatever the length; recent tokens
    are the replay's window. Every query after the prefix recalls.
    """

    name: ClassVar[str] = "tailorkv"
    source: ClassVar[str] = "TailorKV, arXiv 2505.19586: 1 bit or 1/8 of the tokens read, by layer"
    settings: ClassVar[Settings] = {
        "keep": KEEP,
        "bits": Setting(1, 1, 8, whole=True),
        "channels": Setting(8, 1, 512, whole=True),
        "dense": Setting(0.2, 0, 1),
        "sinks": Setting(8, 0, 1024, whole=True),
    }

    def store(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, attention: Attention
    ) -> RecalledLayer:
        heads, cached, width = keys.shape
        if outside_dominant(attention.newest) > self.values["dense"]:
            return self._quantised(keys, values)
        budget = self.budget(cached)
        sinks = min(int(self.values["sinks"]), budget)
        channels = min(int(self.values["channels"]), width)
        choose = partial(_choose, keys, channels, sinks, budget)
        index = heads * cached * channels * STORED_BYTES
        return RecalledLayer(keys, values, cache_bytes(keys, values), index, choose)

    def _quantised(self, keys: torch.Tensor, values: torch.Tensor) -> RecalledLayer:
        bits = int(self.values["bits"])
        whole = keys.shape[1] - keys.shape[1] % GROUP
        groups = keys[:, :whole].unflatten(1, (-1, GROUP)).mT  # [H, groups, D, GROUP]
        coded, size = through_bits(groups, bits)
        tail = keys[:, whole:]
        back = torch.cat((coded.mT.flatten(1, 2), tail), dim=1)
        group = GROUP if values.shape[-1] % GROUP == 0 else values.shape[-1]
        coded_values, size_values = through_bits(values.unflatten(-1, (-1, group)), bits)
        size += size_values + cache_bytes(tail)
        return RecalledLayer(back, coded_values.flatten(-2), size, size)


def outside_dominant(newest: torch.Tensor) -> float:
    """Attention that the newest queries give to others than their top tokens, as a share.

    newest: [KV heads, queries, C], as in `Attention`.
    """
    top = max(1, int(DOMINANT * newest.shape[-1]))
    dominant = newest.topk(top, dim=-1).values.sum(dim=-1)
    return float(1 - (dominant / newest.sum(dim=-1).clamp_min(1e-30)).mean())


def through_bits(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, int]:
    """Groups along the last dimension, asymmetric in 2**bits values, there and back; their bytes.

    Parameters are rounded to float16 before codes are computed.
    """
    low = to_fp16(x.amin(dim=-1, keepdim=True)).float()
    span = x.amax(dim=-1, keepdim=True) - low
    step = to_fp16(span / (2**bits - 1)).float().clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((x - low) / step).round().clamp(0, 2**bits - 1)
    size = -(-x.numel() * bits // 8) + low.numel() * PARAMETER_BYTES
    return (codes * step + low).to(x.dtype), size


def _choose(
    keys: torch.Tensor, channels: int, sinks: int, budget: int, queries: torch.Tensor
) -> torch.Tensor:
    """`Choose` for keys [H, C, D]: the same tokens for all query heads of a KV head."""
    heads, cached, _ = keys.shape
    mean = queries.unflatten(0, (heads, -1)).mean(dim=1)  # [H, T, D]
    strength = mean.abs() * keys.abs().amax(dim=1, keepdim=True)
    used = strength.topk(channels, dim=-1).indices
    partial_queries = torch.zeros_like(mean).scatter_(2, used, mean.gather(2, used))
    scores = (partial_queries @ keys.mT)[..., sinks:]
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., : budget - sinks] + sinks
    chosen = torch.zeros(heads, mean.shape[1], cached, dtype=torch.bool)
    chosen[..., :sinks] = True
    return chosen.scatter_(2, best, True).repeat_interleave(len(queries) // heads, dim=0)
