"""The scheduler's indexes of the tiers, with the orders in which records are given up."""

from __future__ import annotations

from dataclasses import dataclass

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.halving import HalvingOrders, TierHalving
from kvtc_vllm.tiers import policies
from kvtc_vllm.tiers.disk_index import DiskIndex
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.policies.base import EvictionPolicy
from kvtc_vllm.tiers.policies.halving import HalvingOrder
from kvtc_vllm.tiers.policies.spare_first import SpareFirst


@dataclass(frozen=True)
class TierIndexes:
    """spare: None where the configuration asks for none. disk: None without a disk tier."""

    memory: TierIndex
    spare: SpareFirst | None
    disk: DiskIndex | None
    halving: TierHalving


def tier_indexes(config: KVTCConfig, ranks: int) -> TierIndexes:
    """As the configuration asks for."""
    order, cold = _order(config, config.memory_capacity, config.degrade != "off")
    spare = SpareFirst(order) if config.exclusive else None
    memory = TierIndex(config.memory_capacity, ranks, spare or order)
    in_memory, on_disk = HalvingOrders(memory, cold), HalvingOrders(None, None)
    disk = None
    if config.disk_path is not None:
        order, cold = _order(config, config.disk_capacity, config.degrade == "both")
        disk = DiskIndex(config.disk_capacity, ranks, order)
        on_disk = HalvingOrders(disk, cold)
    return TierIndexes(memory, spare, disk, TierHalving(in_memory, on_disk))


def _order(
    config: KVTCConfig, capacity: int, halves: bool
) -> tuple[EvictionPolicy, HalvingOrder | None]:
    """Of eviction, and of halving if the tier halves."""
    order = policies.REGISTRY[config.eviction](capacity)
    cold = HalvingOrder(order) if halves else None
    return cold or order, cold
