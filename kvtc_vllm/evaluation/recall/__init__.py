"""Recall of tokens by name: all are stored, each query reads some. One file per method, one row."""

from __future__ import annotations

from kvtc_vllm.evaluation.recall.base import Recall, RecalledLayer
from kvtc_vllm.evaluation.recall.clusterkv import ClusterKV
from kvtc_vllm.evaluation.recall.tailorkv import TailorKV

_METHODS: tuple[type[Recall], ...] = (ClusterKV, TailorKV)
RECALLS: dict[str, type[Recall]] = {recall.name: recall for recall in _METHODS}

__all__ = ["RECALLS", "Recall", "RecalledLayer"]
