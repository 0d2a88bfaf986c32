"""Cold chunks are made smaller before any is evicted: the scheduler's side and a worker's.

The scheduler names chunks as soon as memory has little room left, so that stores find room and need
not evict. A worker halves them on a thread of its own, within the encoders' share of the CPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.offload.halver import Halver
from kvtc_vllm.offload.messages import Halved, WorkerReport
from kvtc_vllm.offload.rank_context import RankContext
from kvtc_vllm.offload.threads import Throttle, share_of_thread, thread_pool
from kvtc_vllm.tiers.blob_store import StoreError
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.memory import MemoryArena
from kvtc_vllm.tiers.policies.halving import HalvingOrder

logger = logging.getLogger("vllm.kvtc")

ROOM = 8
"""One part in so many of a tier is kept free by halving, as `TierView.has_room` counts it. More
where stores reserve more at once, up to half: else they would evict before anything is halved."""
MOST_AT_ONCE = 32
"""Chunks that workers have been told to halve and have not reported."""


class SizedIndex(Protocol):
    """What is needed of a tier's index."""

    capacity: int
    ranks: int

    @property
    def used(self) -> int:
        """Bytes over all ranks, reservations included."""
        ...

    @property
    def ready_bytes(self) -> int:
        """Bytes of what is there, over all ranks."""
        ...

    def bytes_of(self, key: RecordKey) -> int:
        """Of a record over all ranks; 0 for one that is not complete."""
        ...

    def resize(self, key: RecordKey, rank: int, size: int) -> None:
        """Take note that a rank's part of a record takes other bytes."""
        ...


class HalvingOrders:
    """Which chunks of a tier workers are to halve. Used by the scheduler's thread only.

    order: which are cold. Without it, or without a tier, nothing is halved.
    """

    def __init__(self, index: SizedIndex | None, order: HalvingOrder | None) -> None:
        self._index = index
        self._order = order
        self._reserved = 0  # at once, the most so far
        self._running: dict[RecordKey, list[Halved]] = {}
        self._expected: dict[RecordKey, int] = {}

    def take(self) -> list[RecordKey]:
        """Those of this step, coldest first."""
        found: list[RecordKey] = []
        if self._order is None or self._index is None:
            return found
        capacity, ready = self._index.capacity, self._index.ready_bytes
        self._reserved = max(self._reserved, self._index.used - ready)
        limit = capacity - max(capacity // ROOM, min(self._reserved, capacity // 2))
        coming = sum(self._expected.values())
        while len(self._running) < MOST_AT_ONCE and ready - coming > limit:
            key = self._order.take_coldest()
            if key is None:
                break
            self._running[key] = []
            self._expected[key] = self._index.bytes_of(key) // 2
            coming += self._expected[key]
            found.append(key)
        return found

    def reported(self, outcomes: Iterable[Halved]) -> None:
        """Take note of what became of them."""
        for one in outcomes:
            parts = self._running.get(one.key)
            if parts is None or self._order is None or self._index is None:
                continue
            if one.size is not None:
                self._index.resize(one.key, one.rank, one.size)
            parts.append(one)
            if len(parts) == self._index.ranks:
                del self._running[one.key], self._expected[one.key]
                # A rank that could not halve its part will not be able to the next time.
                times, last = max(p.times for p in parts), any(p.last for p in parts)
                self._order.halved(one.key, times, last)

    def clear(self) -> None:
        """Forget what runs: all names were given up."""
        self._running.clear()
        self._expected.clear()


@dataclass(frozen=True)
class TierHalving:
    """Of both tiers."""

    memory: HalvingOrders
    disk: HalvingOrders

    def reported(self, report: WorkerReport) -> None:
        """Take note of what workers did."""
        self.memory.reported(report.halved)
        self.disk.reported(report.disk_halved)

    def clear(self) -> None:
        """Forget what runs."""
        self.memory.clear()
        self.disk.clear()


class HalvingPipeline:
    """Halves blobs of one rank's memory."""

    def __init__(self, context: RankContext, halver: Halver, memory: MemoryArena) -> None:
        config = context.config
        self._halver = halver
        self._memory = memory
        self._rank = context.rank
        self._outbox = context.outbox
        share = share_of_thread(config.encode_share, context.device, 1, context.geometry.ranks)
        self._share = Throttle(share)
        self._threads = thread_pool("kvtc-halve", 1, context.device)

    def engine_computes(self, busy: bool) -> None:
        """Whether the engine has work of its own in this step."""
        self._share.engine_computes(busy)

    def begin(self, keys: Sequence[RecordKey], epoch: int) -> None:
        """Halve these, one after the other. Engine's thread."""
        for key in keys:
            self._threads.submit(self._halve, key, epoch)

    def shutdown(self) -> None:
        """Finish what runs, drop what waits."""
        self._share.engine_computes(False)
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _halve(self, key: RecordKey, epoch: int) -> None:
        """An outcome for every chunk, or the scheduler would wait for it."""
        started = time.perf_counter()
        blob: Blob = b""
        new: bytes | None = None
        damaged: ContainerError | None = None
        try:
            blob = self._memory.read(key)
            new = self._halver.halve(blob, key)
        except StoreError:
            pass  # evicted meanwhile
        except ContainerError as error:
            damaged = error
            logger.warning("kvtc: a chunk in memory is unusable, dropped: %s", error)
        except CodecError as error:
            logger.info("kvtc: a chunk is not halved: %s", error)
        except Exception:
            logger.exception("kvtc: a chunk is not halved")
        with self._outbox.open() as out:  # against a reset between the check and the write
            if epoch != out.report.epoch:
                return
            kept = new is not None and self._memory.replace(key, blob, new)
            now = new if kept and new is not None else b""
            if damaged is not None:
                out.report.bad.append(key)
                out.stats.add("failed_loads", label=damaged.reason)
            # What could not be halved is as if it had been, as often as can be.
            most = self._halver.most_times
            times = self._halver.times_halved(now) if kept else most
            size = len(now) if kept else None
            out.report.halved.append(Halved(key, self._rank, times, times >= most, size))
            if kept:
                out.stats.add("halved_chunks", label=str(times))
                out.stats.add("halved_bytes", len(blob) - len(now))
        self._outbox.notify()
        self._share.charge(time.perf_counter() - started)
