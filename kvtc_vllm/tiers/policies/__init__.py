"""Eviction policies by name. One file per policy, one row here."""

from __future__ import annotations

from collections.abc import Callable

from kvtc_vllm.tiers.policies.arc import ARCPolicy
from kvtc_vllm.tiers.policies.base import ChunkKey, EvictionPolicy
from kvtc_vllm.tiers.policies.lru import LRUPolicy

REGISTRY: dict[str, Callable[[int], EvictionPolicy]] = {
    LRUPolicy.name: LRUPolicy,
    ARCPolicy.name: ARCPolicy,
}
"""Name -> constructor taking the tier's capacity in bytes."""

__all__ = ["REGISTRY", "ChunkKey", "EvictionPolicy"]
