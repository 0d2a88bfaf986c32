"""SnapKV: the tokens that the newest queries of the prefix attend to, with their neighbours."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from kvtc_vllm.evaluation.eviction.base import WINDOW, Attention, Eviction, window_share
from kvtc_vllm.evaluation.settings import KEEP, Setting, Settings


class SnapKV(Eviction):
    """SnapKV (arXiv 2404.14469): observation window of 32 tokens, average pooling over 7
    (settings `window` and `pooling`; pooling is an odd number).

    The window's tokens stay. Of the others each KV head keeps those that the window's queries
    attend to most, votes averaged over neighbours, so that what stays comes in clusters. Of equals
    the oldest stays.
    The authors' code (github.com/FasterDecoding/SnapKV) pools by the average over 5 by default, and
    its runs of LongBench by the largest of 7 with a window of 32 (setting `max`: 1).
    Departures: the window is the end of the stored prefix, as a tier knows no question yet; it
    takes at most half of the budget. Query heads of a KV head vote together.
    """

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469: 1/8 of the tokens, window 32, pooling 7"
    settings: ClassVar[Settings] = {
        "keep": KEEP,
        "window": WINDOW,
        "pooling": Setting(7, 1, 63, whole=True),
        "max": Setting(0, 0, 1, whole=True),
    }

    def __init__(self, **given: float) -> None:
        super().__init__(**given)
        self._pooling = int(self.values["pooling"])
        if self._pooling % 2 == 0:
            raise ValueError(f"snapkv: pooling={self._pooling} is even; give an odd number")

    def select(self, attention: Attention, budget: int) -> torch.Tensor:
        window = int(self.values["window"])
        observed = attention.observed(window)
        heads, cached = observed.shape
        recent = window_share(budget, window)
        pool = F.max_pool1d if self.values["max"] else F.avg_pool1d
        votes = pool(
            observed[:, None, : cached - recent],
            self._pooling,
            stride=1,
            padding=self._pooling // 2,
        )[:, 0]
        chosen = votes.argsort(dim=1, descending=True, stable=True)[:, : budget - recent]
        newest = torch.arange(cached - recent, cached, device=chosen.device).expand(heads, -1)
        return torch.cat((chosen.sort(dim=1).values, newest), dim=1)
