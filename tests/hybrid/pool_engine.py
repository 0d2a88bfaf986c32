"""vLLM's own manager of blocks under the real scheduler's side: requests without a model.

Full attention in one block table, a window in two, as vLLM deals layers out. KV is the hash that
it stands for, so what is staged from, or loaded into, blocks that hold something else shows.
"""

from __future__ import annotations

from typing import Any

import torch

from kvtc_vllm.config import load_config
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup
from kvtc_vllm.offload.messages import LoadItem, StoreItem, WorkerReport
from kvtc_vllm.offload.on_evict import BlockReuse
from kvtc_vllm.offload.reach import SlidingWindow
from kvtc_vllm.offload.scheduler import KVTCScheduler
from kvtc_vllm.tiers.keys import RecordKey, record_key
from tests.connector.fakes import FakeNew, FakeOutput

BLOCK = 16
CHUNK = 4 * BLOCK
WINDOW = 6 * BLOCK
RECORD_BYTES = 1000
TABLES = 3
MOST_STEPS = 20_000
"""In which an engine drains; more is a loop without an end."""

FULL_GROUP = CacheGroup(("layers.0",), BLOCK, 1, 8, 8, torch.bfloat16, layer_table=(0,))
WINDOW_GROUP = CacheGroup(
    ("layers.1", "layers.2"),
    BLOCK,
    1,
    8,
    8,
    torch.bfloat16,
    reach=SlidingWindow(WINDOW),
    layer_table=(1, 2),
)
GEOMETRY = CacheGeometry((FULL_GROUP, WINDOW_GROUP), 1, BLOCK)
Held = tuple[int, bytes]
"""Block table and hash of the prefix that a block ends."""


def scheduler_side(policy: str, records: int = 1 << 16, **extra: Any) -> KVTCScheduler:
    """With room in memory for so many records."""
    config = load_config(
        {
            "codec": "raw",
            "store_policy": policy,
            "chunk_tokens": CHUNK,
            "recent_window": 0,
            "load_gate": False,
            "memory_bytes": records * RECORD_BYTES,
            **extra,
        }
    )
    bounds = [RECORD_BYTES, RECORD_BYTES]
    return KVTCScheduler(config, GEOMETRY, bounds, False, reuse=BlockReuse(step_blocks=3 * 40))


def _manager(blocks: int, retention: int | None) -> Any:
    from vllm.v1 import kv_cache_interface as specs
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    shape: Any = {
        "block_size": BLOCK,
        "num_kv_heads": 1,
        "head_size": 8,
        "dtype": torch.bfloat16,
    }
    sliding = specs.SlidingWindowSpec(**shape, sliding_window=WINDOW)
    groups = [specs.FullAttentionSpec(**shape), sliding, sliding]
    config = specs.KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[
            specs.KVCacheGroupSpec([f"layers.{n}"], spec) for n, spec in enumerate(groups)
        ],
        prefix_cache_retention_interval=retention,
    )
    return KVCacheManager(config, 8192, BLOCK, BLOCK)


def make_request(name: str, tokens: list[int], answer: int = 0) -> Any:
    """vLLM's request for so many tokens more than its prompt."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    settings = SamplingParams(max_tokens=answer + 1)
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(name, tokens, settings, None, block_hasher=hasher)


class PoolEngine:
    """batch: most tokens of a request in one step. encode_steps: that a store takes.

    wrong: what was staged from, or computed behind, blocks that hold something else. found: of each
    request that ended, the tokens that it did not compute.
    """

    def __init__(
        self,
        side: KVTCScheduler,
        blocks: int,
        batch: int = 512,
        encode_steps: int = 1,
        retention: int | None = 0,
    ) -> None:
        self.side = side
        self.manager = _manager(blocks, retention)
        side.bind_gpu_blocks(self.manager.block_pool)
        self.memory: dict[RecordKey, tuple[Held | None, ...]] = {}
        self.wrong: list[object] = []
        self.found: dict[str, int] = {}
        self.encoded = 0
        self.waiting: list[Any] = []
        self.running: list[Any] = []
        self._batch, self._encode_steps = batch, encode_steps
        self._answers: dict[str, int] = {}
        self._resumed: set[str] = set()
        self._ended: set[str] = set()
        self._contents: dict[int, Held | None] = {}
        self._hashes: dict[RecordKey, list[bytes]] = {}
        self._encoding: list[tuple[int, StoreItem, tuple[Held | None, ...]]] = []
        self._step = self._epoch = 0

    def add(self, request: Any, answer: int = 0) -> None:
        """Queue a request."""
        self._answers[request.request_id] = answer
        self.waiting.append(request)

    def ask(self, request: Any, answer: int = 0) -> int:
        """Run a request to its end, and whatever is queued; tokens that it did not compute."""
        self.add(request, answer)
        self.drain()
        return self.found[request.request_id]

    def drain(self) -> None:
        """Step until nothing is left to do. Raises RuntimeError if that never comes."""
        for _ in range(MOST_STEPS):
            if not (self.waiting or self.running or self.side.has_pending_work()):
                return
            self.step()
        raise RuntimeError(f"the engine is still busy after {MOST_STEPS} steps")

    def step(self) -> None:
        """One step: plan, run, report."""
        self._step += 1
        output, writes, loading = FakeOutput(), list[tuple[Any, int, int]](), list[Any]()
        output.finished_req_ids, self._ended = self._ended, set()
        self.manager.new_step_starts()
        for request in list(self.running):
            if request in self.running:
                self._schedule(request, output, writes)
        while self.waiting and len(self.running) + len(loading) < 4:
            request = self._next()
            if not self._begin(request, output, writes, loading):
                break
            self.waiting.remove(request)
        metadata = self.side.plan_step(output)
        if metadata.epoch != self._epoch:
            self._epoch = metadata.epoch
            self.memory.clear()
            self._encoding.clear()
        self._stage(metadata.stage_first)
        for request, before, after in writes:
            self._write(request, before, after)
        for key in metadata.evict:
            self.memory.pop(key, None)
        report = WorkerReport(metadata.epoch)
        failed = {
            job.request_id
            for job in metadata.loads
            if not self._load(job.items, report) and job.fits
        }
        failed |= {job.request_id for job in metadata.loads if not job.fits}
        self._stage(metadata.stores)
        while self._encoding and self._encoding[0][0] <= self._step:
            _, item, held = self._encoding.pop(0)
            self.memory[item.key] = held
            report.stored.append((item.key, 0, RECORD_BYTES))
        self.side.apply_report(report, {request.request_id for request, _ in loading})
        for request, tokens in loading:
            self._loaded(request, 0 if request.request_id in failed else tokens)
        for request, _, _ in writes:
            self._computed(request)

    def reset(self) -> bool:
        """Reset vLLM's prefix cache; False while a request runs."""
        return bool(self.manager.reset_prefix_cache())

    # ---------------------------------------------------------------- scheduling

    def _next(self) -> Any:
        """As vLLM 0.32: what holds blocks first, or it would wait behind what needs them."""
        return next((r for r in self.waiting if r.num_computed_tokens), self.waiting[0])

    def _begin(
        self, request: Any, output: FakeOutput, writes: list[Any], loading: list[Any]
    ) -> bool:
        name, blocks, local, external = request.request_id, None, 0, 0
        if request.num_computed_tokens == 0:
            blocks, local, junction = self.manager.get_computed_blocks(request)
            request.shared_prefix_boundary = junction
            found = self.side.match(request, local)
            if found is None:
                return False
            external = found
        start = request.num_computed_tokens + local + external
        tokens = 0 if external else min(self._batch, request.num_tokens - start)
        slots = self.manager.allocate_slots(
            request,
            tokens,
            num_new_computed_tokens=local,
            new_computed_blocks=blocks,
            num_external_computed_tokens=external,
            delay_cache_blocks=bool(external),
        )
        if slots is None:
            return False
        tables = self.manager.get_block_ids(name)
        self.side.plan_load(request, tables, external)
        self.found[name] = max(self.found.get(name, 0), local + external)
        if external:
            request.num_computed_tokens = local
            loading.append((request, external))
            return True
        self.running.append(request)
        if name in self._resumed:
            cached = output.scheduled_cached_reqs
            cached.req_ids.append(name)
            cached.resumed_req_ids.add(name)
            cached.new_block_ids.append(tables)
            cached.num_computed_tokens.append(start)
        else:
            output.scheduled_new_reqs.append(FakeNew(name, tables, start))
        self._advance(request, start, tokens, output, writes)
        return True

    def _schedule(self, request: Any, output: FakeOutput, writes: list[Any]) -> None:
        before = request.num_computed_tokens
        tokens = min(self._batch, request.num_tokens - before)
        slots = self.manager.allocate_slots(request, tokens)
        while slots is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return
            slots = self.manager.allocate_slots(request, tokens)
        cached = output.scheduled_cached_reqs
        cached.req_ids.append(request.request_id)
        cached.new_block_ids.append(slots.get_block_ids())
        cached.num_computed_tokens.append(before)
        self._advance(request, before, tokens, output, writes)

    def _advance(
        self, request: Any, before: int, tokens: int, output: FakeOutput, writes: list[Any]
    ) -> None:
        output.num_scheduled_tokens[request.request_id] = tokens
        request.num_computed_tokens = before + tokens
        writes.append((request, before, before + tokens))

    def _preempt(self, request: Any) -> None:
        self.running.remove(request)
        self.manager.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._resumed.add(request.request_id)
        self.waiting.insert(0, request)

    def _computed(self, request: Any) -> None:
        if request not in self.running or request.num_computed_tokens < request.num_tokens:
            return
        done = request.num_tokens - request.num_prompt_tokens
        if done < self._answers[request.request_id]:
            request.append_output_token_ids(7 + done)
            return
        self.running.remove(request)
        self.side.finish(request)
        self.manager.free(request)
        self._ended.add(request.request_id)

    # -------------------------------------------------------------------- worker

    def _write(self, request: Any, before: int, after: int) -> None:
        """Note what a step writes, and that it reads what it should."""
        tables = self.manager.get_block_ids(request.request_id)
        for table in range(TABLES):
            reach = (WINDOW_GROUP if table else FULL_GROUP).reach
            for number in range(reach.first_needed(before) // BLOCK, before // BLOCK):
                expected = (table, request.block_hashes[number])
                if self._contents.get(tables[table][number]) != expected:
                    self.wrong.append((request.request_id, expected))
            for number in range(before // BLOCK, -(-after // BLOCK)):
                full = (number + 1) * BLOCK <= after
                whole = (table, request.block_hashes[number]) if full else None
                if tables[table][number]:
                    self._contents[tables[table][number]] = whole
        for end in range(CHUNK, request.num_tokens + 1, CHUNK):
            own = request.block_hashes[(end - CHUNK) // BLOCK : end // BLOCK]
            for group in range(2):
                self._hashes[record_key(own[-1], group)] = own

    def _stage(self, items: list[StoreItem]) -> None:
        for item in items:
            held = tuple(self._contents.get(block) for block in item.block_ids)
            tables = GEOMETRY.groups[item.group].tables
            own = self._hashes[item.key]
            if held != tuple((table, block) for table in tables for block in own):
                self.wrong.append(item.key)
            self.encoded += 1
            self._encoding.append((self._step + self._encode_steps, item, held))

    def _load(self, items: list[LoadItem], report: WorkerReport) -> bool:
        for item in items:
            held = self.memory.get(item.key)
            if held is None:
                report.bad.append(item.key)
                return False
            tables = len(GEOMETRY.groups[item.group].tables)
            each = len(item.block_ids) // tables
            for n, block in enumerate(item.block_ids):
                place = n // each * (CHUNK // BLOCK) + item.first_block + n % each
                self._contents[block] = held[place]
        return True

    def _loaded(self, request: Any, tokens: int) -> None:
        """The request goes on behind what was loaded, or from its beginning."""
        if tokens:
            request.num_computed_tokens += tokens
            self.manager.cache_blocks(request, request.num_computed_tokens)
        else:
            self.manager.free(request)
            request.num_computed_tokens = 0
            self.found[request.request_id] = 0
        self.waiting.insert(0, request)
