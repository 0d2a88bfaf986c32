"""Token eviction by name. One file per method, one row here."""

from __future__ import annotations

from kvtc_vllm.evaluation.eviction.base import Attention, Eviction
from kvtc_vllm.evaluation.eviction.chunkkv import ChunkKV
from kvtc_vllm.evaluation.eviction.dbudgetkv import DBudgetKV
from kvtc_vllm.evaluation.eviction.h2o import H2O
from kvtc_vllm.evaluation.eviction.snapkv import SnapKV
from kvtc_vllm.evaluation.eviction.tova import Tova

_METHODS: tuple[type[Eviction], ...] = (H2O, Tova, SnapKV, ChunkKV, DBudgetKV)
EVICTIONS: dict[str, type[Eviction]] = {eviction.name: eviction for eviction in _METHODS}

__all__ = ["EVICTIONS", "Attention", "Eviction"]
