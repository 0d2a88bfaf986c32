"""Scheduler side: decides what is stored, loaded and evicted.

Runs in the engine core's thread only. It never sees a byte of KV.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.connector.blocks import BlockTables
from kvtc_vllm.connector.gate import LoadGate
from kvtc_vllm.connector.geometry import CacheGeometry, check_budget, check_chunk_tokens
from kvtc_vllm.connector.keys import (
    LOAD,
    STORE,
    adapter_digest,
    allowed,
    chunk_key,
    chunk_keys,
)
from kvtc_vllm.connector.messages import (
    LoadItem,
    LoadJob,
    StepMetadata,
    StoreItem,
    WorkerReport,
)
from kvtc_vllm.connector.metrics import KVTCStats
from kvtc_vllm.connector.promotion import Promotions
from kvtc_vllm.tiers import policies
from kvtc_vllm.tiers.admission import SeenCounter
from kvtc_vllm.tiers.disk_index import DiskIndex
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.policies import ChunkKey

STEPS_IN_FLIGHT = 64
"""Steps whose time is taken at once; vLLM plans one or two ahead."""


@dataclass
class _RequestState:
    """What we remember of one request between its steps.

    adapter: contents of its LoRA adapter. unadmitted: chunks that too few have contained.
    """

    request: Any
    adapter: bytes
    unadmitted: set[ChunkKey] = field(default_factory=set)
    next_chunk: int = 0
    looked_up: int = 0
    withheld: int = 0
    admitted: bool | None = None
    """The load gate's decision; None until it was asked."""
    gated: int = 0


class KVTCScheduler:
    """Tier index, lookups and the plan of each step.

    prompt_only: never store blocks filled while generating.
    """

    def __init__(self, config: KVTCConfig, geometry: CacheGeometry, prompt_only: bool) -> None:
        self._config = config
        self._block_size = geometry.block_size
        self._chunk_tokens = config.chunk_tokens
        self._blocks_per_chunk = check_chunk_tokens(config, geometry.block_size)
        self._prompt_only = prompt_only
        self._bound = check_budget(config, geometry)
        capacity, ranks = config.memory_capacity, geometry.tp_size
        policy = policies.REGISTRY[config.eviction]
        self.index = TierIndex(capacity, ranks, policy(capacity))
        self.disk: DiskIndex | None = None
        self._promotions: Promotions | None = None
        if config.disk_path is not None:
            disk_bytes = config.disk_capacity
            self.disk = DiskIndex(disk_bytes, ranks, policy(disk_bytes))
            self._promotions = Promotions(self.index, self.disk, config.load_deadline)
        self._seen = SeenCounter(config.store_threshold)
        self._gate = LoadGate(config.load_gate)
        self._touched: list[ChunkKey] = []
        self._steps: deque[tuple[int, int, float]] = deque(maxlen=STEPS_IN_FLIGHT)
        self._step_number = 0
        self._last_result = 0.0
        self._states: dict[str, _RequestState] = {}
        self._tables = BlockTables()
        self._loading: dict[str, list[ChunkKey]] = {}
        self._new_loads: list[LoadJob] = []
        self._epoch = 0
        self._told_epoch = 0
        self._counted_evictions = (0, 0)
        self._stats = KVTCStats()
        self._last_disk_gauges: tuple[int, int] | None = None
        self._last_gauges: tuple[int, int, int] | None = None

    def match(self, request: Any, num_computed_tokens: int) -> int | None:
        """Tokens after `num_computed_tokens` that the tier can supply; None: ask again later.

        Idempotent: vLLM may ask many times. Never reaches into the recent window.
        """
        state = self._state(request)
        state.looked_up, state.withheld, state.gated = num_computed_tokens, 0, 0
        # vLLM asks also for requests that must compute every token, and then loads nothing.
        if not allowed(request, LOAD) or getattr(request, "skip_reading_prefix_cache", False):
            return 0
        # At least one token must be left to compute, for its logits.
        limit = request.num_tokens - max(1, self._config.window)
        limit -= limit % self._block_size
        keys = chunk_keys(request, self._blocks_per_chunk, state.adapter)
        first = num_computed_tokens // self._chunk_tokens
        found = self._found(keys, first)
        if self._promotions is not None:
            wanted = keys[first : -(-max(0, limit) // self._chunk_tokens)]
            in_memory = min(found - first, len(wanted))
            if self._promotions.must_wait(request.request_id, wanted, in_memory):
                return None
            found = self._found(keys, first)
        available = found * self._chunk_tokens
        tokens = max(0, min(available, limit) - num_computed_tokens)
        state.withheld = max(0, available - num_computed_tokens) - tokens
        if tokens:
            if state.admitted is None:
                state.admitted = self._gate.admits()
            if not state.admitted:
                state.gated, tokens = tokens, 0
        return tokens

    def _state(self, request: Any) -> _RequestState:
        state = self._states.get(request.request_id)
        if state is None:
            state = _RequestState(request, adapter_digest(request))
            self._states[request.request_id] = state
        state.request = request
        return state

    def _found(self, keys: Sequence[ChunkKey], first: int) -> int:
        """End of the run of chunks in memory that begins with number `first`."""
        found = first
        while found < len(keys) and self.index.is_ready(keys[found]):
            found += 1
        return found

    def plan_load(self, request: Any, block_ids: list[int], tokens: int) -> None:
        """Blocks were allocated; `tokens` of them are to come from the tier (0: none)."""
        state = self._state(request)
        if request.request_id in self._loading or request.num_computed_tokens:
            return  # scheduled again after its load: nothing new was looked up
        try:
            self._plan_load(state, block_ids, tokens)
        finally:  # only now, since the load pins what it needs
            if self._promotions is not None:
                self._promotions.forget(request.request_id)

    def _plan_load(self, state: _RequestState, block_ids: list[int], tokens: int) -> None:
        request = state.request
        keys = chunk_keys(request, self._blocks_per_chunk, state.adapter)
        start = state.looked_up
        # vLLM leaves a preempted request's second lookup out of its own hit rate; so do we.
        resumed = "resumed_" if request.num_preemptions else ""
        self._stats.add(f"{resumed}lookup_tokens", request.num_tokens - start)
        self._stats.add("window_tokens", state.withheld)
        if state.gated:
            self._stats.add("gated_tokens", state.gated)
        if not tokens:
            return
        self._stats.add(f"{resumed}hit_tokens", tokens)
        end = start + tokens
        items = []
        end_chunk = -(-end // self._chunk_tokens)
        for chunk in range(start // self._chunk_tokens, end_chunk):
            chunk_start = chunk * self._chunk_tokens
            first = max(start, chunk_start) // self._block_size
            last = min(end, chunk_start + self._chunk_tokens) // self._block_size
            items.append(
                LoadItem(
                    key=keys[chunk],
                    start=chunk_start,
                    first_block=first - chunk_start // self._block_size,
                    block_ids=list(block_ids[first:last]),
                )
            )
        # vLLM may defer this call by a step; what was evicted since is reported as missing.
        self._loading[request.request_id] = self.index.pin(item.key for item in items)
        self.index.hit(keys[:end_chunk])
        if self.disk is not None:
            self._touched += self.disk.hit(keys[:end_chunk])
        self._new_loads.append(LoadJob(request.request_id, items))

    def plan_step(self, scheduler_output: Any) -> StepMetadata:
        """Everything the workers have to do in this step."""
        stores: list[StoreItem] = []
        for request_id, progress in self._tables.update(scheduler_output).items():
            state = self._states.get(request_id)
            if state is None:
                continue
            if progress.resumed:
                state.next_chunk = 0
            stores += self._new_stores(state, progress.computed + progress.scheduled)
        for request_id in scheduler_output.finished_req_ids:
            self._states.pop(request_id, None)
            self._tables.forget(request_id)
        self._step_number += 1
        tokens = sum(scheduler_output.num_scheduled_tokens.values())
        if tokens:
            self._steps.append((self._step_number, tokens, time.monotonic()))
        self._told_epoch = self._epoch
        evicted = self.index.take_evicted()
        loads, self._new_loads = self._new_loads, []
        touched, self._touched = self._touched, []
        return StepMetadata(
            number=self._step_number,
            tokens=tokens,
            epoch=self._epoch,
            evict=evicted,
            loads=loads,
            stores=stores,
            demote=self._to_demote(self.index.take_victims()),
            promote=self._promotions.take_orders() if self._promotions is not None else [],
            disk_remove=self.disk.take_removed() if self.disk is not None else [],
            touch=touched,
            idle=not tokens and self.has_pending_work(),
        )

    def apply_report(self, report: WorkerReport | None, finished_loads: set[str] | None) -> None:
        """Results of a step: sizes, failures, finished loads."""
        if report is not None:
            self._take_time(report.step)
        if report is not None and report.epoch == self._epoch:
            self._gate.observe_load(report.load_tokens, report.load_seconds)
            if self.disk is not None:
                for key, rank, size in report.disk_stored:
                    self.disk.add(key, rank, size)
                for key in report.disk_lost:
                    self.disk.lose(key)
            for key, rank, size in report.stored:
                self.index.commit(key, rank, size)
            for key, rank in report.dropped:
                self.index.abandon(key, rank)
            for key in report.bad:
                self.index.discard(key)
            if self._promotions is not None:
                self._promotions.reported(key for key, _, _ in report.stored)
                self._promotions.reported(key for key, _ in report.dropped)
        for request_id in finished_loads or ():
            self.index.unpin(self._loading.pop(request_id, ()))

    def _take_time(self, step: int) -> None:
        """The results of a step came. Steps may overlap: each counts from the one before."""
        now = time.monotonic()
        while self._steps and self._steps[0][0] <= step:
            number, tokens, began = self._steps.popleft()
            if number == step:
                self._gate.observe_step(tokens, now - max(began, self._last_result))
                self._last_result = now

    def restore(self, inventories: Mapping[int, Sequence[tuple[ChunkKey, int]]]) -> None:
        """What workers found on disk when they started, by rank."""
        if self.disk is not None:
            self.disk.restore(inventories)

    def finish(self, request: Any) -> None:
        """The request ended; its prefix becomes the most recent, head last."""
        if self._promotions is not None:
            self._promotions.forget(request.request_id)
        state = self._states.get(request.request_id)
        if state is not None:
            self.index.refresh(chunk_keys(request, self._blocks_per_chunk, state.adapter))

    def reset(self) -> None:
        """Forget every chunk; blobs, files and running work of older epochs go with them."""
        self.index.clear()
        if self.disk is not None:
            self.disk.clear()
        if self._promotions is not None:
            self._promotions.clear()
        self._touched.clear()
        # What they pinned is gone; its names may come back meanwhile, pinned by others.
        self._loading = {request_id: [] for request_id in self._loading}
        self._epoch += 1

    def has_pending_work(self) -> bool:
        """True while workers have something to report, or to be told, although no request runs."""
        untold = self.disk is not None and self._told_epoch != self._epoch
        return self.index.pending > 0 or bool(self._loading) or untold

    def take_stats(self) -> KVTCStats | None:
        """Counters since the last call, with gauges when they moved."""
        index = self.index
        before, self._counted_evictions = (
            self._counted_evictions,
            (index.evictions, index.evicted_bytes),
        )
        if index.evictions > before[0]:
            self._stats.add("evicted_chunks", index.evictions - before[0])
            self._stats.add("evicted_bytes", index.evicted_bytes - before[1])
        self._add_disk_stats()
        gauges = (index.ready_bytes, index.used, len(index))
        if gauges != self._last_gauges:
            self._last_gauges = gauges
            self._stats.set("tier_used_bytes", gauges[0])
            self._stats.set("tier_reserved_bytes", gauges[1])
            self._stats.set("tier_chunks", gauges[2])
            self._stats.set("tier_capacity_bytes", index.capacity)
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, KVTCStats()
        return stats

    def _add_disk_stats(self) -> None:
        disk, promotions = self.disk, self._promotions
        if disk is None or promotions is None:
            return
        for name, count in (
            ("disk_evicted_chunks", disk.evictions),
            ("expired_waits", promotions.expired),
        ):
            if count:
                self._stats.add(name, count)
        disk.evictions = promotions.expired = 0
        gauges = (disk.used, len(disk))
        if gauges != self._last_disk_gauges:
            self._last_disk_gauges = gauges
            self._stats.set("disk_used_bytes", gauges[0])
            self._stats.set("disk_chunks", gauges[1])
            self._stats.set("disk_capacity_bytes", disk.capacity)

    def _to_demote(self, victims: Sequence[ChunkKey]) -> list[ChunkKey]:
        """Of the chunks that make room in memory, those to be written to disk first."""
        if self.disk is None or self._config.disk_write == "through":
            return []
        return [key for key in victims if not self.disk.is_ready(key)]

    def _new_stores(self, state: _RequestState, computed_tokens: int) -> list[StoreItem]:
        """Chunks that this step completes and the tier does not have."""
        if computed_tokens < (state.next_chunk + 1) * self._chunk_tokens:
            return []  # as in nearly every step that generates
        request = state.request
        if not allowed(request, STORE):
            return []
        block_ids = self._tables.ids[request.request_id]
        if self._prompt_only:
            computed_tokens = min(computed_tokens, request.num_prompt_tokens)
        # Hashes exist for confirmed tokens only, so speculative ones never count.
        blocks = min(computed_tokens // self._block_size, len(request.block_hashes), len(block_ids))
        complete = blocks // self._blocks_per_chunk
        stores = []
        for chunk in range(state.next_chunk, complete):
            first = chunk * self._blocks_per_chunk
            key = chunk_key(request, self._blocks_per_chunk, chunk, state.adapter)
            if self.index.is_known(key) or key in state.unadmitted:
                continue
            if not self._seen.admits(key):
                state.unadmitted.add(key)  # a request that is preempted counts once
                self._stats.add("unadmitted_chunks")
                continue
            if self.index.reserve(key, self._bound):
                stores.append(
                    StoreItem(
                        key=key,
                        start=chunk * self._chunk_tokens,
                        block_ids=block_ids[first : first + self._blocks_per_chunk],
                    )
                )
        state.next_chunk = max(state.next_chunk, complete)
        return stores
