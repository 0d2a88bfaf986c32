"""Scheduler side of promotion: chunks are read from disk into memory before they are offered.

A request whose prefix continues on disk waits, outside the running batch and without
blocks, until its chunks are in memory and verified, or until its deadline; then it
is offered whatever is ready. It does not wait where reading is expected to take longer than
recomputing, and no longer than that would take.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvtc_vllm.offload.read_queue import ReadQueue
from kvtc_vllm.tiers.disk_index import DiskIndex
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.keys import RecordKey


@dataclass
class _Waiting:
    wanted: dict[RecordKey, None]
    """Of what it wants from disk, what is being read."""
    pinned: list[RecordKey]
    """Of the prefix, and in memory."""
    deadline: float
    lacks: bool = False
    """Whether a read for it gave nothing."""


class Promotions:
    """Requests that wait for disk. Used by the scheduler's thread only.

    Whatever a request waits for, and what it found, stays pinned until the request is
    scheduled or ends. deadline_seconds: longest wait of one request. worth_waiting: seconds after
    which so many tokens from disk are of no use. expired: requests that waited until their deadline
    and still lack chunks. refused: those that did not wait, since recomputing is faster.
    """

    def __init__(
        self,
        memory: TierIndex,
        disk: DiskIndex,
        deadline_seconds: float,
        worth_waiting: Callable[[int], float] = lambda tokens: math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.reads = ReadQueue()
        self._worth_waiting = worth_waiting
        self._memory = memory
        self._disk = disk
        self._seconds = deadline_seconds
        self._clock = clock
        self._waiting: dict[str, _Waiting] = {}
        self._settled: dict[str, list[RecordKey]] = {}
        self._reading: dict[RecordKey, list[_Waiting]] = {}
        self._orders: list[RecordKey] = []
        self.expired = 0
        self.refused = 0

    def is_waiting(self, request_id: str) -> bool:
        """True while nothing can have changed for a request that was told to wait.

        Takes constant time: it is asked for every such request in every step.
        """
        waiting = self._waiting.get(request_id)
        return waiting is not None and bool(waiting.wanted) and self._clock() < waiting.deadline

    def must_wait(self, request_id: str, keys: Sequence[RecordKey], tokens: int = 0) -> bool:
        """True while the request should be looked up again later. Starts reading at first.

        keys: the records that could be loaded, first to last. tokens: that they stand for.
        """
        if request_id in self._settled:
            return False
        waiting = self._waiting.get(request_id)
        if waiting is None:
            waiting = self._start(request_id, keys, tokens)
        self.reported(list(waiting.wanted))
        due = self._clock() >= waiting.deadline
        if waiting.wanted and not due:
            return True
        # A read has the same deadline as the request, so that its failure may be known first.
        if due and (waiting.wanted or waiting.lacks):
            self.expired += 1
        del self._waiting[request_id]
        self._settled[request_id] = waiting.pinned
        waiting.wanted.clear()
        return False

    def forget(self, request_id: str) -> None:
        """Unpin what was kept for a request that was scheduled, or ended."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            self._memory.unpin(waiting.pinned)
            waiting.wanted.clear()
        self._memory.unpin(self._settled.pop(request_id, ()))

    def reported(self, keys: Iterable[RecordKey]) -> None:
        """Take note of these records if they were read, or could not be."""
        for key in keys:
            if key in self._reading and not self._memory.is_pending(key):
                self._end_read(key)

    def take_orders(self) -> list[RecordKey]:
        """Chunks that workers must read, since the last call."""
        orders, self._orders = self._orders, []
        return orders

    def clear(self) -> None:
        """Forget everything. Call after the memory index was cleared."""
        self._waiting.clear()
        self._settled.clear()
        self._reading.clear()
        self._orders.clear()

    def _start(self, request_id: str, keys: Sequence[RecordKey], tokens: int) -> _Waiting:
        patience, worth = self._patience(keys, tokens)
        waiting = _Waiting({}, [], self._clock() + patience)
        is_ready, reading = self._memory.is_ready, self._reading
        for key in keys:
            if is_ready(key):
                waiting.pinned += self._memory.pin((key,))
            elif worth and ((key in reading and self._is_reading(key)) or self._order(key)):
                waiting.wanted[key] = None
                reading[key].append(waiting)
            else:
                break
        self._waiting[request_id] = waiting
        return waiting

    def _patience(self, keys: Sequence[RecordKey], tokens: int) -> tuple[float, bool]:
        """Seconds that a request may wait for what it lacks, and whether it should wait at all."""
        is_ready, reading, on_disk = self._memory.is_ready, self._reading, self._disk.is_ready
        lacking = new = 0
        for key in keys:
            if is_ready(key):
                continue
            if key not in reading:
                if not on_disk(key):
                    break
                new += 1
            lacking += 1
        if not lacking:
            return self._seconds, True
        patience = min(self._seconds, self._worth_waiting(tokens * lacking // len(keys)))
        worth = self.reads.worth(len(self._reading) + new, patience)
        self.refused += not worth
        return patience, worth

    def _order(self, key: RecordKey) -> bool:
        size = self._disk.part_bytes(key)
        if not size:
            return False
        if not self._memory.reserve(key, size):
            if size > self._memory.rank_capacity:
                self._disk.lose(key)  # no record is as large: the file says what is not so
            return False
        self._orders.append(key)
        self._reading[key] = []
        return True

    def _is_reading(self, key: RecordKey) -> bool:
        self.reported((key,))
        return key in self._reading

    def _end_read(self, key: RecordKey) -> None:
        """Pin what arrived for whoever waits for it."""
        for waiting in self._reading.pop(key):
            if key not in waiting.wanted:
                continue  # its request went
            del waiting.wanted[key]
            arrived = self._memory.pin((key,))
            waiting.pinned += arrived
            waiting.lacks |= not arrived
