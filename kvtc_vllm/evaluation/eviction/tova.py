"""TOVA: the tokens that the newest query attends to most."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvtc_vllm.evaluation.eviction.base import Attention, Eviction


class Tova(Eviction):
    """Token Omission Via Attention (arXiv 2401.06104) with the settings of the KVTC paper.

    One decision per layer: the newest query's attention, averaged over the query heads.
    Nothing protects recent tokens. Of equals the oldest stays.
    Departures: tokens go when the prefix is stored, all at once, by the last query of the prefix,
    where the paper drops one with each new one. This favours the method on what the last query
    looks at, and what earlier queries would have dropped can still be chosen.
    """

    name: ClassVar[str] = "tova"
    source: ClassVar[str] = "TOVA, arXiv 2401.06104: 1/8 of the tokens, one choice a layer"

    def select(self, attention: Attention, budget: int) -> torch.Tensor:
        mean = attention.last.double().mean(dim=0, keepdim=True)
        most = mean.argsort(dim=1, descending=True, stable=True)[:, :budget]
        return most.sort(dim=1).values
