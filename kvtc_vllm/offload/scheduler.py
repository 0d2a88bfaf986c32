"""Scheduler side: decides what is stored, loaded and evicted.

Runs in the engine core's thread only. It never sees a byte of KV.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.block_tables import BlockTables
from kvtc_vllm.offload.geometry import CacheGeometry
from kvtc_vllm.offload.keys import LOAD, allowed
from kvtc_vllm.offload.load_policy import LoadPolicy, Way
from kvtc_vllm.offload.lookup import PrefixLookup
from kvtc_vllm.offload.messages import LoadJob, StepMetadata, StoreItem, WorkerReport
from kvtc_vllm.offload.on_evict import BlockReuse
from kvtc_vllm.offload.promotion import Promotions
from kvtc_vllm.offload.requests import RequestState, RequestStates
from kvtc_vllm.offload.running_loads import RunningLoads
from kvtc_vllm.offload.stats import Stats
from kvtc_vllm.offload.store_planner import StorePlanner
from kvtc_vllm.offload.store_policy import StorePolicy, make_store_policy
from kvtc_vllm.offload.store_timing import make_timing, stored_at_once
from kvtc_vllm.offload.tier_indexes import tier_indexes
from kvtc_vllm.offload.tier_stats import TierStats
from kvtc_vllm.offload.tier_view import TierView
from kvtc_vllm.offload.vllm_types import BlockPool, Request, SchedulerOutput
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.shared_arena import page_bytes

NONCE_BYTES = 8
"""Of a generation."""
MOST_LOADS = 3
"""Of one request that has not run yet: where a failure costs the whole load, it is looked up
again."""


class KVTCScheduler:
    """Tier index, lookups and the plan of each step.

    bounds: by cache group, most bytes of a record on any rank. prompt_only: never store blocks
    filled while generating. loads, stores: what the engine's role among others allows.
    store_policy: instead of what the configuration asks for. reuse: what the engine does with
    blocks. one_copy: the first rank keeps for all of them. shares_experts: with other engines.
    """

    def __init__(
        self,
        config: KVTCConfig,
        geometry: CacheGeometry,
        bounds: Sequence[int],
        prompt_only: bool,
        loads: bool = True,
        stores: bool = True,
        store_policy: StorePolicy | None = None,
        reuse: BlockReuse | None = None,
        one_copy: bool = False,
        shares_experts: bool = False,
    ) -> None:
        self._loads_allowed = loads
        self._config = config
        self._chunk_tokens = config.chunk_tokens
        self._demotes = config.disk_write == "behind"
        ranks = geometry.ranks
        keepers = 1 if one_copy else ranks
        if one_copy:
            bounds = [page_bytes(bound) for bound in bounds]
        tiers = self._indexes = tier_indexes(config, ranks, keepers)
        self.index, self.disk = tiers.memory, tiers.disk
        self._spare, self._halving = tiers.spare, tiers.halving
        self._load_policy = LoadPolicy(config.load_gate, ranks, keeps_part=geometry.keeps_all)
        self._promotions: Promotions | None = None
        if self.disk is not None:
            self._promotions = Promotions(
                self.index, self.disk, config.load_deadline, self._load_policy.worth_waiting
            )
        self._stats = Stats()
        self._lookup = PrefixLookup(config, geometry, self.index)
        self._tiers = TierView(self.index, self.disk, len(geometry.groups), self._spare)
        policy = store_policy or make_store_policy(
            stores=stores,
            prompt_only=prompt_only,
            threshold=config.store_threshold,
            refused=lambda: self._stats.add("unadmitted_chunks"),
            timing=make_timing(
                config,
                geometry,
                self._tiers,
                reuse or BlockReuse(step_blocks=0),
                lambda name, amount, label: self._stats.add(name, amount, label),
                stored_at_once(config, geometry, bounds, keepers),
                loads=loads,
            ),
        )
        self._stores = StorePlanner(
            config,
            geometry,
            bounds,
            self.index,
            self._tiers,
            policy,
            no_room=lambda records: self._stats.add("dropped_stores", records, "tier_full"),
        )
        self._touched: list[RecordKey] = []
        self._step_number = 0
        self._requests = RequestStates(ranks, geometry.boundary_tokens, shares_experts)
        self._tables = BlockTables(geometry.block_tables)
        self._loads = RunningLoads()
        self._new_loads: list[LoadJob] = []
        self._check_due = False
        self._epoch = 0
        self._told_epoch = 0
        self._generation = b""
        self._tier_stats = TierStats(self.index, self.disk, self._promotions)

    def bind_gpu_blocks(self, block_pool: BlockPool) -> None:
        """vLLM's pool of KV blocks, from which resets and evictions of its prefix cache are seen.

        Called once, before the first step.
        """
        self._requests.freshness.bind(block_pool)
        self._stores.bind(block_pool)

    def match(self, request: Request, num_computed_tokens: int) -> int | None:
        """Tokens after `num_computed_tokens` that the tier can supply; None: ask again later.

        Idempotent: vLLM may ask many times.
        """
        self._look_for_reset()
        if self._still_waits(request.request_id):
            return None
        state = self._requests.of(request)
        state.looked_up, state.withheld, state.gated = num_computed_tokens, 0, 0
        state.bypassed = not self._may_load(state)
        if state.bypassed:
            return 0
        if state.adapter is None:
            return None
        records = self._lookup.records(self._lookup.chunks(request, state.adapter))
        start, lookup = num_computed_tokens, self._lookup
        if self._promotions is not None:
            wanted = lookup.wanted(records, start, request.num_tokens, self._tiers.has)
            left = request.num_tokens - start
            if self._promotions.must_wait(request.request_id, wanted, left):
                return None
        found = lookup.found(records, start, request.num_tokens)
        if self._loads.should_wait(request, lookup.needed(records, start, found.end)):
            self._stats.add("shared_load_waits", not state.waited)
            state.waited = True
            return None
        tokens = max(0, found.end - start)
        state.withheld = max(0, found.available - start) - tokens
        if found.run > found.available:
            state.junction = found.run
        return self._decide(state, tokens) if tokens else 0

    def _decide(self, state: RequestState, tokens: int) -> int | None:
        """What to offer of `tokens` tokens that are in memory."""
        if state.way is Way.LATER:
            state.way = self._load_policy.decide(state.request.request_id, tokens)
        if state.way is Way.LATER:
            self._stats.add("gate_waits", not state.put_off)
            state.put_off = True
            return None
        if state.way is Way.LOAD:
            return tokens
        state.gated = tokens
        return 0

    def _still_waits(self, request_id: str) -> bool:
        """Whether a request that was told to ask again later need not be looked up yet."""
        if self._promotions is not None and self._promotions.is_waiting(request_id):
            return True
        return self._loads.is_waiting(request_id) or self._load_policy.still_later(request_id)

    def _may_load(self, state: RequestState) -> bool:
        request = state.request
        self._requests.find_adapter(state)
        return (
            self._loads_allowed
            and state.loads < MOST_LOADS
            and allowed(request, LOAD)
            # vLLM asks also for requests that must compute every token, and then loads nothing.
            and not getattr(request, "skip_reading_prefix_cache", False)
            and not state.nameless
        )

    def plan_load(self, request: Request, tables: Sequence[Sequence[int]], tokens: int) -> None:
        """Order the load of `tokens` tokens (0: none) into blocks that were allocated for them.

        tables: the request's block ids by block table.
        """
        state = self._requests.of(request)
        loaded = self._loads.is_running(request.request_id) or request.num_computed_tokens
        if loaded or not tokens:
            left = request.num_tokens - max(state.looked_up, request.num_computed_tokens)
            self._load_policy.computation_begins(request.request_id, left, state.gated > 0)
        if loaded:
            return  # scheduled again after its load: nothing new was looked up
        state.way = Way.LATER
        self._requests.begin(state, self._step_number + 1, tokens)
        try:
            self._plan_load(state, tables, tokens)
        finally:
            # After the load has pinned what it needs, what waiting had pinned may go.
            if self._promotions is not None:
                self._promotions.forget(request.request_id)

    def _plan_load(self, state: RequestState, tables: Sequence[Sequence[int]], tokens: int) -> None:
        request = state.request
        start = state.looked_up
        if state.bypassed:
            self._stats.add("bypassed_tokens", request.num_tokens - start)
            return
        # vLLM leaves a preempted request's second lookup out of its own hit rate; so do we.
        resumed = "resumed_" if request.num_preemptions else ""
        self._stats.add(f"{resumed}lookup_tokens", request.num_tokens - start)
        self._stats.add("window_tokens", state.withheld)
        if state.gated:
            self._stats.add("gated_tokens", state.gated)
        if not tokens:
            return
        self._stats.add(f"{resumed}hit_tokens", tokens)
        assert state.adapter is not None
        state.loads += 1
        chunks = self._lookup.chunks(request, state.adapter)
        end = start + tokens
        if end > request.num_tokens - self._config.window:
            self._stats.add("short_window_loads")
        fits = self._lookup.fits(start, end, tables)
        items = self._lookup.load_items(self._lookup.records(chunks), start, end, tables)
        # vLLM may defer this call by a step; what was evicted since is reported as missing.
        pinned = self.index.pin(item.key for item in items)
        if self.index.keepers < self.index.ranks:
            for item in items:
                item.place = self.index.place_of(item.key)
        self._loads.begin(request, [item.key for item in items], pinned)
        last = -(-end // self._chunk_tokens)
        self._stores.loaded(request.request_id, chunks[start // self._chunk_tokens : last])
        used = self._lookup.records(chunks[:last])
        self.index.hit(used)
        if self.disk is not None:
            self._touched += self.disk.hit(used)
        patience = self._load_policy.load_planned(request.request_id, tokens)
        job = LoadJob(request.request_id, items, state.adapter, patience, fits)
        self._new_loads.append(job)

    def plan_step(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        """Everything the workers have to do in this step."""
        self._look_for_reset()
        due, gone = self._stores.due(), self._stores.take_gone()
        stores: list[StoreItem] = []
        progresses = self._tables.update(scheduler_output)
        for state, progress in self._requests.scheduled(progresses):
            computed = progress.computed + progress.scheduled
            if computed < (state.next_chunk + 1) * self._chunk_tokens:
                continue  # as in nearly every step that generates
            tables = self._tables.ids[state.request.request_id]
            stores += self._stores.completed(state, tables, progress.computed, computed)
        for request_id in scheduler_output.finished_req_ids:
            self._requests.forget(request_id)
            self._tables.forget(request_id)
            self._stores.forget(request_id)
            self._load_policy.forget(request_id)
        self._step_number += 1
        tokens = sum(scheduler_output.num_scheduled_tokens.values())
        self._load_policy.step_planned(self._step_number, scheduler_output.num_scheduled_tokens)
        self._requests.freshness.planned(self._step_number, tokens)
        check = self._check_due and tokens > 0
        self._check_due = self._check_due and not check
        self._told_epoch = self._epoch
        evicted, victims = self.index.take_evicted(), self.index.take_victims()
        settled = self._indexes.take_settled()
        to_disk = victims if self._demotes else settled
        loads, self._new_loads = self._new_loads, []
        touched, self._touched = self._touched, []
        return StepMetadata(
            number=self._step_number,
            tokens=tokens,
            epoch=self._epoch,
            generation=self._generation,
            check=check,
            adapters=self._requests.adapters.take_wanted(),
            stage_first=due,
            gone=gone,
            demote=self._tiers.not_on_disk(to_disk),
            settled=settled,
            disk_remove=self.disk.take_removed() if self.disk is not None else [],
            touch=touched,
            promote=self._promotions.take_orders() if self._promotions is not None else [],
            evict=evicted,
            halve=self._halving.memory.take(),
            disk_halve=self._halving.disk.take(),
            give_up=self._load_policy.give_up(),
            loads=loads,
            stores=stores,
            kept=self._stores.take_kept(),
            idle=not tokens and self.has_pending_work(),
        )

    def apply_report(self, report: WorkerReport | None, finished_loads: set[str] | None) -> None:
        """Take over the results of a step: sizes, failures, finished loads."""
        if report is not None:
            self._load_policy.step_ended(report.step)
        if report is not None and report.epoch == self._epoch:
            self._load_policy.observe_loads(report.loading)
            ended = self._indexes.take(report)
            self._stores.settled(key for key in ended if not self.index.is_pending(key))
            for key in report.bad:
                self.index.discard(key)
            if self._promotions is not None:
                self._promotions.reads.observe(report.reading)
                self._promotions.reported(ended)
            for number, digests in report.adapters.items():
                self._requests.take_adapter(number, digests, report.step)
            if report.named_in:
                self._take_naming(report.named_in, report.other_weights)
            if report.stale_since:
                self._take_change(report.stale_since)
        for request_id in finished_loads or ():
            if not self._loads.is_running(request_id):
                self._requests.take_foreign(request_id)
            loaded = self._loads.end(request_id)
            self.index.unpin(loaded)
            if self._spare is not None:
                self._spare.spare(key for key in loaded if self.index.is_ready(key))
            self._load_policy.load_ended(request_id)

    def _take_naming(self, step: int, other_weights: bool) -> None:
        """Count the names of this epoch as made, in `step`."""
        if other_weights:
            self._stats.add("weight_changes")
            self._requests.take_change(step)
        self._requests.freshness.prove()

    def _take_change(self, step: int) -> None:
        """Give up all names: the weights were found to be others, first in `step`."""
        if self.index.keepers > 1 or self._requests.shares_experts:
            # A rank whose own weights are what they were would go on under its name of before, and
            # what it stored then would be found beside what the others store now.
            self._generation = os.urandom(NONCE_BYTES)
        self._requests.take_change(step)
        self._requests.start_again()
        self._begin_epoch()

    def _look_for_reset(self) -> bool:
        """An emptied prefix cache often follows an update of the weights: have them compared."""
        seen = self._requests.freshness.saw_reset()
        self._check_due = self._check_due or seen
        return seen

    def restore(self, inventories: Mapping[int, Iterable[tuple[RecordKey, int]]]) -> None:
        """Take over what workers found on disk when they started, by rank."""
        if self.disk is not None:
            self.disk.restore(inventories)

    def finish(self, request: Request) -> None:
        """Make the prefix of a request that ended the most recent, head last."""
        if self._promotions is not None:
            self._promotions.forget(request.request_id)
        self._loads.forget(request)
        state = self._requests.get(request.request_id)
        if state is not None and state.adapter is not None:
            chunks = self._lookup.chunks(request, state.adapter)
            self.index.refresh(self._lookup.records(chunks))

    def reset(self) -> None:
        """Forget every chunk, and use names from now on that nobody has used before."""
        self._generation = os.urandom(NONCE_BYTES)
        if not self._look_for_reset():
            # vLLM kept its blocks. Have the weights just changed? Workers will tell.
            self._requests.freshness.doubt()
        self._requests.taint_all()
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        """Blobs and running work of older epochs are of no use; files are left to others."""
        self._indexes.clear()
        if self._promotions is not None:
            self._promotions.clear()
        self._halving.clear()
        self._touched.clear()
        self._stores.clear()
        self._loads.forget_names()
        self._epoch += 1

    def has_pending_work(self) -> bool:
        """True while workers have something to report, or to be told, although no request runs."""
        untold = self.disk is not None and self._told_epoch != self._epoch
        return self.index.pending > 0 or bool(self._loads or self._indexes.settled) or untold

    def take_stats(self) -> Stats | None:
        """Counters since the last call, with gauges when they moved."""
        self._tier_stats.add_to(self._stats)
        stats, self._stats = self._stats, Stats()
        return None if stats.is_empty() else stats
