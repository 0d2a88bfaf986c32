"""What an eviction method implements: attention of one layer -> which of its tokens stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

SHARE_KEPT = 1 / 8
"""Of the tokens, in the KVTC paper's comparison."""
OBSERVED = 32
"""Newest queries whose attention is also known apart: SnapKV's observation window."""


@dataclass(frozen=True)
class Attention:
    """What the C cached tokens of one layer, in order of position, received (after softmax).

    received: [KV heads, C] float64, summed over all queries and over the query heads
    that share a KV head. last: [query heads, C], compute dtype, from the newest query.
    observed: [KV heads, C] float64, summed over the newest `OBSERVED` queries (or all, if there
    were fewer) and over the query heads that share a KV head.
    """

    received: torch.Tensor
    last: torch.Tensor
    observed: torch.Tensor


def observed_share(budget: int) -> int:
    """Newest tokens that always stay, where a method keeps the observation window.

    Never more than half of the budget, so that something is chosen at all.
    """
    return min(OBSERVED, budget // 2)


class Eviction(ABC):
    """Chooses tokens by attention alone. Instances have no state.

    share_kept: budget as a share of the tokens seen, in (0, 1].
    """

    name: ClassVar[str]
    """Key in `kvtc_vllm.evaluation.eviction.EVICTIONS`."""
    source: ClassVar[str]
    """Paper, and the settings followed."""

    def __init__(self, share_kept: float = SHARE_KEPT) -> None:
        if not 0 < share_kept <= 1:
            raise ValueError(f"share_kept={share_kept} is not in (0, 1]")
        self.share_kept = share_kept

    def budget(self, seen: int) -> int:
        """Tokens a layer's KV head may keep of `seen` (at least 1); at least 1."""
        return max(1, int(seen * self.share_kept))

    @abstractmethod
    def select(self, attention: Attention, budget: int) -> torch.Tensor:
        """Cached tokens that stay: [sets, budget] int64, ascending in each row, 0 is the oldest.

        sets: one for each KV head, or 1 if all heads of the layer keep the same tokens.
        budget: at least 1 and at most C.
        """
