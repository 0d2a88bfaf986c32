"""Token eviction by name. One file per method, one row here."""

from __future__ import annotations

from kvtc_vllm.evaluation.eviction.base import Attention, Eviction
from kvtc_vllm.evaluation.eviction.h2o import H2O
from kvtc_vllm.evaluation.eviction.tova import Tova

EVICTIONS: dict[str, type[Eviction]] = {eviction.name: eviction for eviction in (H2O, Tova)}

__all__ = ["EVICTIONS", "Attention", "Eviction"]
