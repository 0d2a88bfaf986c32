"""What an eviction method implements: attention of one layer -> which of its tokens stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtc_vllm.evaluation.settings import Budgeted, Setting

OBSERVED = 32
"""Newest queries whose attention is also known apart: SnapKV's observation window."""
WINDOW = Setting(OBSERVED, 1, OBSERVED, whole=True)
"""Newest queries that vote, where a method has an observation window."""


@dataclass(frozen=True)
class Attention:
    """What the C cached tokens of one layer, in order of position, received (after softmax).

    received: [KV heads, C] float64, summed over all queries and over the query heads
    that share a KV head. last: [query heads, C], compute dtype, from the newest query.
    newest: [KV heads, queries, C] float64, from each of the newest `OBSERVED` queries (or all, if
    there were fewer), the newest last, summed over the query heads that share a KV head.
    """

    received: torch.Tensor
    last: torch.Tensor
    newest: torch.Tensor

    def observed(self, window: int) -> torch.Tensor:
        """Summed over the newest `window` queries: [KV heads, C] float64."""
        return self.newest[:, -window:].sum(dim=1)


def pooled(layers: Sequence[Attention]) -> Attention:
    """Of all layers and KV heads as if they were one, for a choice that all of them share."""
    return Attention(
        torch.stack([layer.received.sum(dim=0) for layer in layers]).sum(dim=0)[None],
        torch.cat([layer.last for layer in layers]),
        torch.stack([layer.newest.sum(dim=0) for layer in layers]).sum(dim=0)[None],
    )


def window_share(budget: int, window: int) -> int:
    """Newest tokens that always stay, where a method keeps the observation window.

    Never more than half of the budget, so that something is chosen at all.
    """
    return min(window, budget // 2)


class Eviction(Budgeted, ABC):
    """Chooses tokens by attention alone. Listed in `kvtc_vllm.evaluation.eviction.EVICTIONS`."""

    @abstractmethod
    def select(self, attention: Attention, budget: int) -> torch.Tensor:
        """Cached tokens that stay: [sets, kept] int64, ascending in each row, 0 is the oldest.

        sets: one for each KV head, or 1 if all heads of the layer keep the same tokens.
        kept: at most budget. budget: at least 1 and at most C.
        """
