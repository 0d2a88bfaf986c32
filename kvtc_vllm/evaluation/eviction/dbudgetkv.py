"""DBudgetKV: old tokens go until attention's norm would change."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvtc_vllm.evaluation.eviction.base import Attention, Eviction
from kvtc_vllm.evaluation.settings import Setting, Settings


class DBudgetKV(Eviction):
    """DBudgetKV, later called ReFreeKV (arXiv 2502.16886): no budget is given, a norm tells.

    Followed: tokens are ranked by position alone. The first ones (setting `sinks`) always stay;
    of the others the oldest go first. Per layer, as many go as possible while the norm of what
    the newest query's attention gives to the others that stay, averaged over the query heads, is
    lower by no more than 1 % (setting `threshold`) than to all others. At least the newest token
    stays.
    Charged: K and V of what stays, and a bit per token and layer.
    Departures: the norm is that of the newest query, as in the authors' released code, where the
    paper also writes of the whole attention matrix; that query is the last of the stored prefix.
    The authors' code can rank by attention as well; the paper's ranking is taken.
    """

    name: ClassVar[str] = "dbudgetkv"
    source: ClassVar[str] = "DBudgetKV, arXiv 2502.16886: norm of attention within 1 %, 4 sinks"
    settings: ClassVar[Settings] = {
        "threshold": Setting(0.01, 0, 0.999),
        "sinks": Setting(4, 0, 1024, whole=True),
    }

    def budget(self, seen: int) -> int:
        """All: how many stay is told by attention."""
        return seen

    def select(self, attention: Attention, budget: int) -> torch.Tensor:
        cached = attention.last.shape[1]
        sinks = min(int(self.values["sinks"]), cached - 1)
        others = attention.last[:, sinks:].double().square()
        # norms[n]: of what is left when the n oldest of the others are gone.
        norms = others.flip(1).cumsum(dim=1).flip(1).sqrt().mean(dim=0)
        gone = int((norms >= (1 - self.values["threshold"]) * norms[0]).nonzero()[-1])
        kept = torch.ones(cached, dtype=torch.bool)
        kept[sinks : sinks + gone] = False
        return kept.nonzero()[:, 0][None]
