"""The scheduler's index of memory, with the orders in which its records are given up."""

from __future__ import annotations

from dataclasses import dataclass

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.halving import HalvingOrders
from kvtc_vllm.tiers import policies
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.policies.halving import HalvingOrder
from kvtc_vllm.tiers.policies.spare_first import SpareFirst


@dataclass(frozen=True)
class MemoryIndex:
    """spare: None where the configuration asks for none."""

    index: TierIndex
    spare: SpareFirst | None
    halving: HalvingOrders


def memory_index(config: KVTCConfig, ranks: int) -> MemoryIndex:
    """As the configuration asks for."""
    capacity = config.memory_capacity
    order = policies.REGISTRY[config.eviction](capacity)
    halving = HalvingOrder(order) if config.degrade != "off" else None
    spare = SpareFirst(halving or order) if config.exclusive else None
    index = TierIndex(capacity, ranks, spare or halving or order)
    return MemoryIndex(index, spare, HalvingOrders(index, halving))
