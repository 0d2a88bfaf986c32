"""Counters and gauges of the tiers, as the scheduler's indexes have them."""

from __future__ import annotations

from kvtc_vllm.offload.promotion import Promotions
from kvtc_vllm.offload.stats import Stats
from kvtc_vllm.tiers.disk_index import DiskIndex
from kvtc_vllm.tiers.index import TierIndex


class TierStats:
    """What changed since the last time. Used by the scheduler's thread only."""

    def __init__(
        self, memory: TierIndex, disk: DiskIndex | None, promotions: Promotions | None
    ) -> None:
        self._memory = memory
        self._disk = disk
        self._promotions = promotions
        self._evictions = (0, 0)
        self._memory_gauges: tuple[int, int, int] | None = None
        self._disk_gauges: tuple[int, int] | None = None

    def add_to(self, stats: Stats) -> None:
        """Add increments, and gauges that moved."""
        self._add_memory(stats)
        if self._disk is not None and self._promotions is not None:
            self._add_disk(stats, self._disk, self._promotions)

    def _add_memory(self, stats: Stats) -> None:
        index = self._memory
        before, self._evictions = self._evictions, (index.evictions, index.evicted_bytes)
        if index.evictions > before[0]:
            stats.add("evicted_chunks", index.evictions - before[0])
            stats.add("evicted_bytes", index.evicted_bytes - before[1])
        gauges = (index.ready_bytes, index.used, len(index))
        if gauges != self._memory_gauges:
            self._memory_gauges = gauges
            stats.set("tier_used_bytes", gauges[0])
            stats.set("tier_reserved_bytes", gauges[1])
            stats.set("tier_chunks", gauges[2])
            stats.set("tier_capacity_bytes", index.capacity)

    def _add_disk(self, stats: Stats, disk: DiskIndex, promotions: Promotions) -> None:
        for name, count in (
            ("disk_evicted_chunks", disk.evictions),
            ("expired_waits", promotions.expired),
            ("refused_waits", promotions.refused),
        ):
            if count:
                stats.add(name, count)
        disk.evictions = promotions.expired = promotions.refused = 0
        gauges = (disk.used, len(disk))
        if gauges != self._disk_gauges:
            self._disk_gauges = gauges
            stats.set("disk_used_bytes", gauges[0])
            stats.set("disk_chunks", gauges[1])
            stats.set("disk_capacity_bytes", disk.capacity)
