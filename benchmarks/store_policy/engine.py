"""vLLM's scheduler and a worker in small: requests are block hashes, KV is the hash it stands for.

Everything that decides is real: `KVTCScheduler`, its indexes and its store policy. The engine
allocates, hits, preempts and frees as vLLM does, and its worker notes what each block holds, so
that a chunk staged from a block that was overwritten shows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from benchmarks.store_policy.pool import SimBlock, SimPool
from kvtc_vllm.offload.messages import StepMetadata, StoreItem, WorkerReport
from kvtc_vllm.offload.scheduler import KVTCScheduler
from kvtc_vllm.tiers.disk import disk_bytes
from kvtc_vllm.tiers.keys import RecordKey

BLOCK = 16
"""Tokens per block."""
MOST_STEPS = 100_000
"""In which an engine drains; more is a loop without an end."""


@dataclass(eq=False)
class SimRequest:
    """vLLM's `Request`. hashes: of all its blocks, those of the answer included."""

    request_id: str
    hashes: Sequence[bytes]
    num_prompt_tokens: int
    answer_tokens: int = 0
    num_tokens: int = 0
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    blocks: list[SimBlock] = field(default_factory=list)
    status: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(name="WAITING"))

    def __post_init__(self) -> None:
        self.num_tokens = self.num_prompt_tokens

    @property
    def block_hashes(self) -> Sequence[bytes]:
        return self.hashes[: self.num_tokens // BLOCK]

    @property
    def all_token_ids(self) -> Sequence[int]:
        return range(self.num_tokens)

    @property
    def block_ids(self) -> list[int]:
        return [block.block_id for block in self.blocks]


@dataclass
class Totals:
    """Tokens and records since the start."""

    prompt_tokens: int = 0
    engine_hit_tokens: int = 0
    loaded_tokens: int = 0
    computed_tokens: int = 0
    encoded_records: int = 0
    preemptions: int = 0


@dataclass
class _Planned:
    """A step on its way to the worker."""

    metadata: StepMetadata
    writes: list[tuple[int, bytes]]
    ending: list[SimRequest]


class SimEngine:
    """One engine.

    batch: most tokens per step. ahead: steps that are planned before the first of them has run,
    as with asynchronous scheduling. encode_steps: steps that a store takes. record_bytes: of a
    blob. wrong: records that were staged from blocks which hold something else. filled: hashes of
    all blocks that any step was to fill. memory, disk: what the worker holds, by key the hashes of
    its blocks; it writes through to disk where the scheduler's side has one.
    """

    def __init__(
        self,
        side: KVTCScheduler,
        num_blocks: int,
        record_bytes: int,
        batch: int = 2048,
        requests: int = 16,
        ahead: int = 0,
        encode_steps: int = 1,
    ) -> None:
        self.side = side
        self.pool = SimPool(num_blocks)
        side.bind_gpu_blocks(self.pool)
        self.totals = Totals()
        self.memory: dict[RecordKey, tuple[bytes | None, ...]] = {}
        self.disk: dict[RecordKey, tuple[bytes | None, ...]] = {}
        self.wrong: list[RecordKey] = []
        self.filled: set[bytes] = set()
        self._record_bytes = record_bytes
        self._batch, self._requests = batch, requests
        self._ahead, self._encode_steps = ahead, encode_steps
        self._contents: list[bytes | None] = [None] * num_blocks
        self._parents: dict[bytes, bytes | None] = {}
        self.waiting: deque[SimRequest] = deque()
        self.running: list[SimRequest] = []
        self._loading: dict[str, tuple[SimRequest, int]] = {}
        self._finished: set[str] = set()
        self._planned: deque[_Planned] = deque()
        self._encoding: deque[tuple[int, StoreItem, tuple[bytes | None, ...]]] = deque()
        self._step = self._epoch = 0

    def add(self, request: SimRequest) -> None:
        """Queue a request."""
        parent: bytes | None = None
        for own in request.hashes:
            self._parents[own] = parent
            parent = own
        self.totals.prompt_tokens += request.num_prompt_tokens
        self.waiting.append(request)

    @property
    def loads(self) -> int:
        """Requests that are being loaded."""
        return len(self._loading)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or the worker has something left."""
        return bool(self.waiting or self.running or self._loading) or self.side.has_pending_work()

    def step(self) -> None:
        """Plan a step, and run the one that is due."""
        self._planned.append(self._plan())
        if len(self._planned) > self._ahead:
            self._run(self._planned.popleft())

    def drain(self) -> None:
        """Step until nothing is left to do. Raises RuntimeError if that never comes."""
        steps = 0
        while self.busy or self._planned:
            while self.busy:
                self.step()
                steps += 1
                if steps > MOST_STEPS:
                    raise RuntimeError(f"the engine is still busy after {MOST_STEPS} steps")
            self.settle()

    def settle(self) -> None:
        """Run all steps that are planned."""
        while self._planned:
            self._run(self._planned.popleft())

    def abort(self, request: SimRequest) -> None:
        """End a request that waits or runs."""
        if request in self.waiting:
            self.waiting.remove(request)
            self.side.finish(request)
            self.pool.free_blocks(list(reversed(request.blocks)))
        elif request in self.running:
            self._end(request)

    def held(self) -> set[bytes]:
        """Hashes that the engine's own cache finds."""
        return set(self.pool.cached_block_hash_to_block)

    # ---------------------------------------------------------------- scheduling

    def _plan(self) -> _Planned:
        self._step += 1
        budget, writes = self._batch, list[tuple[int, bytes]]()
        new: list[SimpleNamespace] = []
        cached = SimpleNamespace(
            req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[]
        )
        scheduled: dict[str, int] = {}
        preempted = False
        for request in list(self.running):
            if request not in self.running:
                continue  # preempted
            tokens = min(budget, max(1, request.num_tokens - request.num_computed_tokens))
            if not tokens or self._is_done(request):
                continue
            before = len(request.blocks)
            while not self._grow(request, tokens):
                victim = self.running[-1]
                self._preempt(victim)
                preempted = True
                if victim is request:
                    break
            if request not in self.running:
                continue
            cached.req_ids.append(request.request_id)
            cached.new_block_ids.append((request.block_ids[before:],))
            cached.num_computed_tokens.append(request.num_computed_tokens)
            scheduled[request.request_id] = tokens
            budget -= tokens
            self._advance(request, tokens, writes)
        for request in list(self.waiting):
            if preempted or not budget or len(self.running) >= self._requests:
                break
            admitted = self._admit(request, budget)
            if admitted is None:
                if not self.running and not self._loading:
                    self._release_waiting(request)
                break
            if not admitted:
                continue
            tokens = admitted
            if request.num_preemptions:
                cached.req_ids.append(request.request_id)
                cached.resumed_req_ids.add(request.request_id)
                cached.new_block_ids.append((request.block_ids,))
                cached.num_computed_tokens.append(request.num_computed_tokens)
            else:
                new.append(
                    SimpleNamespace(
                        req_id=request.request_id,
                        block_ids=(request.block_ids,),
                        num_computed_tokens=request.num_computed_tokens,
                    )
                )
            scheduled[request.request_id] = tokens
            budget -= tokens
            self._advance(request, tokens, writes)
        finished, self._finished = self._finished, set()
        metadata = self.side.plan_step(
            SimpleNamespace(
                scheduled_new_reqs=new,
                scheduled_cached_reqs=cached,
                num_scheduled_tokens=scheduled,
                finished_req_ids=finished,
            )
        )
        ending = [r for r in self.running if r.request_id in scheduled and self._is_done(r)]
        return _Planned(metadata, writes, ending)

    def _admit(self, request: SimRequest, budget: int) -> int | None:
        """Tokens to compute of a waiting request; 0 if it waits on, None if nothing fits."""
        if request.num_computed_tokens == 0:
            hits: list[SimBlock] = []
            for own in request.block_hashes[: (request.num_tokens - 1) // BLOCK]:
                block = self.pool.find(own)
                if block is None:
                    break
                hits.append(block)
            local = len(hits) * BLOCK
            external = self.side.match(request, local)
            if external is None:
                return 0
            tokens = external or min(budget, request.num_tokens - local)
            need = -(-(local + tokens) // BLOCK) - len(hits)
            free = self.pool.free - sum(block.ref_cnt == 0 for block in hits)
            if need > free:
                return None
            self.pool.touch(hits)
            request.blocks = hits + self.pool.get_new_blocks(need)
            self.side.plan_load(request, (request.block_ids,), external)
            self.waiting.remove(request)
            if not request.num_preemptions:
                self.totals.engine_hit_tokens += local
            request.num_computed_tokens = local
            if external:
                request.status.name = "WAITING_FOR_REMOTE_KVS"
                self._loading[request.request_id] = (request, external)
                return 0
        else:
            tokens = min(budget, max(1, request.num_tokens - request.num_computed_tokens))
            if not self._grow(request, tokens):
                return None
            self.side.plan_load(request, (request.block_ids,), 0)
            self.waiting.remove(request)
        request.status.name = "RUNNING"
        self.running.append(request)
        return tokens

    def _grow(self, request: SimRequest, tokens: int) -> bool:
        need = -(-(request.num_computed_tokens + tokens) // BLOCK) - len(request.blocks)
        if need > self.pool.free:
            return False
        request.blocks += self.pool.get_new_blocks(max(0, need))
        return True

    def _advance(self, request: SimRequest, tokens: int, writes: list[tuple[int, bytes]]) -> None:
        """Count tokens as computed by this step, and cache the blocks that it fills."""
        first = request.num_computed_tokens // BLOCK
        request.num_computed_tokens += tokens
        self.totals.computed_tokens += tokens
        for number in range(first, request.num_computed_tokens // BLOCK):
            block, own = request.blocks[number], request.hashes[number]
            writes.append((block.block_id, own))
            self.filled.add(own)
            if block.block_hash is None:
                self.pool.cache(block, own)
        last = request.num_prompt_tokens + request.answer_tokens
        if request.num_computed_tokens == request.num_tokens < last:
            request.num_tokens += 1

    def _is_done(self, request: SimRequest) -> bool:
        last = request.num_prompt_tokens + request.answer_tokens
        return request.num_computed_tokens >= last

    def _preempt(self, request: SimRequest) -> None:
        self.running.remove(request)
        self.pool.free_blocks(list(reversed(request.blocks)))
        request.blocks = []
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status.name = "PREEMPTED"
        self.totals.preemptions += 1
        self.waiting.appendleft(request)

    def _release_waiting(self, kept: SimRequest) -> None:
        """Take the blocks of other requests that were loaded and wait: nothing else would end."""
        for request in self.waiting:
            if request is not kept and request.blocks:
                self.pool.free_blocks(list(reversed(request.blocks)))
                request.blocks, request.num_computed_tokens = [], 0

    def _end(self, request: SimRequest) -> None:
        if request not in self.running:
            return
        self.running.remove(request)
        self.side.finish(request)
        self.pool.free_blocks(list(reversed(request.blocks)))
        self._finished.add(request.request_id)

    # -------------------------------------------------------------------- worker

    def _run(self, planned: _Planned) -> None:
        step = planned.metadata
        if step.epoch != self._epoch:
            self._epoch = step.epoch
            self.memory.clear()
            self._encoding.clear()
        self._stage(step.stage_first)
        for block, own in planned.writes:
            self._contents[block] = own
        for key in step.evict:
            self.memory.pop(key, None)
        loaded: set[str] = set()
        bad: dict[str, int] = {}
        report = WorkerReport(step.epoch)
        for job in step.loads:
            loaded.add(job.request_id)
            for item in job.items:
                kept = self.memory.get(item.key)
                if kept is None:
                    report.bad.append(item.key)
                    bad[job.request_id] = min(bad.get(job.request_id, item.start), item.start)
                    continue
                for number, held in zip(item.block_ids, kept[item.first_block :], strict=False):
                    self._contents[number] = held
        self._stage(step.stores)
        for key in step.disk_remove:
            del self.disk[key]
        for key in step.promote:
            self.memory[key] = self.disk[key]
            report.stored.append((key, 0, self._record_bytes))
        while self._encoding and self._encoding[0][0] <= self._step:
            _, stored, blob = self._encoding.popleft()
            self.memory[stored.key] = blob
            report.stored.append((stored.key, 0, self._record_bytes))
            if self.side.disk is not None:
                self.disk[stored.key] = blob
                report.disk_stored.append((stored.key, 0, disk_bytes(self._record_bytes)))
        self.side.apply_report(report, loaded)
        for name in loaded:
            self._take_loaded(name, bad.get(name))
        for request in planned.ending:
            self._end(request)

    def _take_loaded(self, name: str, bad: int | None) -> None:
        request, external = self._loading.pop(name)
        end = request.num_computed_tokens + external
        if bad is not None:
            end = max(request.num_computed_tokens, bad)
        self.totals.loaded_tokens += end - request.num_computed_tokens
        request.num_computed_tokens = end
        for number in range(end // BLOCK):
            if request.blocks[number].block_hash is None:
                self.pool.cache(request.blocks[number], request.hashes[number])
        request.status.name = "WAITING"
        self.waiting.appendleft(request)
        if not end:
            self.pool.free_blocks(list(reversed(request.blocks)))
            request.blocks = []

    def _stage(self, items: Sequence[StoreItem]) -> None:
        for item in items:
            held = tuple(self._contents[number] for number in item.block_ids)
            own: bytes | None = bytes(item.key)
            for found in reversed(held):
                if own is None or found != own:
                    self.wrong.append(item.key)
                    break
                own = self._parents[own]
            self.totals.encoded_records += 1
            self._encoding.append((self._step + self._encode_steps, item, held))
