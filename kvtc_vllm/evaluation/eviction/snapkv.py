"""SnapKV: the tokens that the newest queries of the prefix attend to, with their neighbours."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from kvtc_vllm.evaluation.eviction.base import Attention, Eviction, observed_share

KERNEL = 7
"""Tokens over which votes are averaged."""


class SnapKV(Eviction):
    """SnapKV (arXiv 2404.14469): observation window of 32 tokens, average pooling over 7.

    The window's tokens stay. Of the others each KV head keeps those that the window's queries
    attend to most, votes averaged over neighbours, so that what stays comes in clusters. Of equals
    the oldest stays.
    Departures: the window is the end of the stored prefix, as a tier knows no question yet; it
    takes at most half of the budget.
    """

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469: 1/8 of the tokens, window 32, pooling 7"

    def select(self, attention: Attention, budget: int) -> torch.Tensor:
        heads, cached = attention.observed.shape
        recent = observed_share(budget)
        votes = F.avg_pool1d(
            attention.observed[:, None, : cached - recent], KERNEL, stride=1, padding=KERNEL // 2
        )[:, 0]
        chosen = votes.argsort(dim=1, descending=True, stable=True)[:, : budget - recent]
        newest = torch.arange(cached - recent, cached, device=chosen.device).expand(heads, -1)
        return torch.cat((chosen.sort(dim=1).values, newest), dim=1)
