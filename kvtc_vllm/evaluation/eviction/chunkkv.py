"""ChunkKV: runs of tokens stay or go as one, by what the newest queries attend to."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvtc_vllm.evaluation.eviction.base import WINDOW, Attention, Eviction, window_share
from kvtc_vllm.evaluation.settings import KEEP, Setting, Settings


class ChunkKV(Eviction):
    """ChunkKV (arXiv 2502.00299): runs of 10 tokens, observation window of 32 (settings `run` and
    `window`).

    The window's tokens stay. Tokens before it are in runs; those runs stay whose tokens
    got the most attention from the window's queries, summed over the heads of the layer: one
    choice a layer. Of equals the oldest stays. What is left of the budget and too little for a
    run goes to the newest tokens.
    Departures: every layer chooses for itself, where the paper lets neighbouring layers share
    one choice to save time; the window is the end of the stored prefix and takes at most half of
    the budget.
    """

    name: ClassVar[str] = "chunkkv"
    source: ClassVar[str] = "ChunkKV, arXiv 2502.00299: 1/8 of the tokens, runs of 10, window 32"
    settings: ClassVar[Settings] = {
        "keep": KEEP,
        "window": WINDOW,
        "run": Setting(10, 1, 256, whole=True),
    }

    def select(self, attention: Attention, budget: int) -> torch.Tensor:
        window, length = int(self.values["window"]), int(self.values["run"])
        received = attention.observed(window).sum(dim=0)
        cached = len(received)
        recent = window_share(budget, window)
        runs = received[: cached - recent].split(length)
        scores = torch.stack([run.sum() for run in runs])
        kept = torch.zeros(cached, dtype=torch.bool)
        kept[cached - recent :] = True
        left = budget - recent
        for number in scores.argsort(descending=True, stable=True).tolist():
            if len(runs[number]) <= left:
                kept[number * length : number * length + len(runs[number])] = True
                left -= len(runs[number])
        newest = (~kept).nonzero()[:, 0].flip(0)[:left]
        kept[newest] = True
        return kept.nonzero()[:, 0][None]
