"""H2O: the newest tokens and those that received the most attention so far."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvtc_vllm.evaluation.eviction.base import Attention, Eviction
from kvtc_vllm.evaluation.settings import KEEP, Setting, Settings


class H2O(Eviction):
    """Heavy-Hitter Oracle (arXiv 2306.14048) with the settings of the KVTC paper.

    Half of the budget is the newest tokens (setting `recent`), the other half (and the odd one)
    those of the rest with the largest sum of attention, chosen by each KV head for itself. Of
    equals the oldest stays.
    Departures: tokens go when the prefix is stored, all at once, where the paper drops one with
    each new one. So sums are over attention to all tokens, and nothing that went early is missing
    in what was computed after it: this favours the method. Query heads of a KV head share a sum.
    """

    name: ClassVar[str] = "h2o"
    source: ClassVar[str] = "H2O, arXiv 2306.14048: 1/16 recent, 1/16 heavy hitters"
    settings: ClassVar[Settings] = {"keep": KEEP, "recent": Setting(1 / 2, 0, 1)}

    def select(self, attention: Attention, budget: int) -> torch.Tensor:
        heads, cached = attention.received.shape
        recent = int(budget * self.values["recent"])
        older = attention.received[:, : cached - recent]
        heavy = older.argsort(dim=1, descending=True, stable=True)[:, : budget - recent]
        newest = torch.arange(cached - recent, cached, device=heavy.device).expand(heads, -1)
        return torch.cat((heavy.sort(dim=1).values, newest), dim=1)
