"""The scheduler's indexes of the tiers, with the orders in which records are given up."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.geometry import writes_settled
from kvtc_vllm.offload.halving import HalvingOrders, TierHalving
from kvtc_vllm.offload.messages import WorkerReport
from kvtc_vllm.tiers import policies
from kvtc_vllm.tiers.disk_index import DiskIndex
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.keys import RecordKey
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
    writes_settled: bool
    """Ranks are told what all of them have stored, as nothing else may get on disk."""
    settled: list[RecordKey] = field(default_factory=list)
    """Stored on all ranks, which have not been told so."""

    def take(self, report: WorkerReport) -> list[RecordKey]:
        """Take over sizes and failures; returns what a rank has stored, promoted or given up."""
        memory, disk = self.memory, self.disk
        if disk is not None:
            for key, rank, size in report.disk_stored:
                disk.add(key, rank, size)
            for key in report.disk_lost:
                disk.lose(key)
        for key, place in report.placed:
            memory.put(key, place)
        for key, rank, size in report.stored:
            memory.commit(key, rank, size)
        for key, rank, size in report.resized:
            memory.resize(key, rank, size)
        self.halving.reported(report)
        for key, rank in report.dropped:
            memory.abandon(key, rank)
        ended = [key for key, _, _ in report.stored] + [key for key, _ in report.dropped]
        if self.writes_settled:
            self.settled.extend(key for key in dict.fromkeys(ended) if memory.is_ready(key))
        return ended

    def take_settled(self) -> list[RecordKey]:
        """What all of several ranks have stored since the last call, where there is a disk.

        Nothing may get there that one rank speaks against: if only its weights have changed, the
        others' names are what they were, and so is theirs if its weights ever come back.
        """
        settled = list(self.settled)
        self.settled.clear()
        return settled

    def clear(self) -> None:
        """Forget everything; files are left where they are."""
        self.memory.clear()
        if self.disk is not None:
            self.disk.clear()
        self.settled.clear()


def tier_indexes(config: KVTCConfig, ranks: int, keepers: int | None = None) -> TierIndexes:
    """As the configuration asks for. keepers: ranks that keep something, None for all."""
    keepers = ranks if keepers is None else keepers
    order, cold = _order(config, config.memory_capacity, config.degrade != "off")
    spare = SpareFirst(order) if config.exclusive else None
    memory = TierIndex(config.memory_capacity, ranks, spare or order, keepers)
    in_memory, on_disk = HalvingOrders(memory, cold), HalvingOrders(None, None)
    disk = None
    if config.disk_path is not None:
        order, cold = _order(config, config.disk_capacity, config.degrade == "both")
        disk = DiskIndex(config.disk_capacity, keepers, order)
        on_disk = HalvingOrders(disk, cold)
    halving = TierHalving(in_memory, on_disk)
    return TierIndexes(memory, spare, disk, halving, writes_settled(config, ranks))


def _order(
    config: KVTCConfig, capacity: int, halves: bool
) -> tuple[EvictionPolicy, HalvingOrder | None]:
    """Of eviction, and of halving if the tier halves."""
    order = policies.REGISTRY[config.eviction](capacity)
    cold = HalvingOrder(order) if halves else None
    return cold or order, cold
