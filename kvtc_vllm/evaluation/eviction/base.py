"""What an eviction method implements: attention of one layer -> which of its tokens stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtc_vllm.evaluation.settings import Setting, Settings, resolve

KEEP = Setting(1 / 8, 1 / 1024, 1)
"""Share of the tokens that stay; the default is that of the KVTC paper's comparison."""
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


class Eviction(ABC):
    """Chooses tokens by attention alone. Instances have no state.

    given: values of `settings`, by name. Raises ValueError for others.
    """

    name: ClassVar[str]
    """Key in `kvtc_vllm.evaluation.eviction.EVICTIONS`."""
    source: ClassVar[str]
    """Paper, and the settings followed."""
    settings: ClassVar[Settings] = {"keep": KEEP}

    def __init__(self, **given: float) -> None:
        self.values = resolve(self.name, self.settings, given)

    def budget(self, seen: int) -> int:
        """Tokens a layer's KV head may keep of `seen` (at least 1); at least 1."""
        return max(1, int(seen * self.values["keep"]))

    @abstractmethod
    def select(self, attention: Attention, budget: int) -> torch.Tensor:
        """Cached tokens that stay: [sets, kept] int64, ascending in each row, 0 is the oldest.

        sets: one for each KV head, or 1 if all heads of the layer keep the same tokens.
        kept: at most budget. budget: at least 1 and at most C.
        """
