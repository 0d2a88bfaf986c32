"""Worker side: the tiers of one rank, and the pipelines into and out of them.

The engine's thread calls `begin_step`, `store`, `poll` and the `take_*` methods;
encoding, loading and the disk have threads of their own and leave their results in
an outbox that the engine's thread empties once per step. Nothing here blocks a step
longer than the staging of the blocks to store.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch

from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.disk_news import NO_NEWS, keep, tell
from kvtc_vllm.offload.disk_worker import DiskWorker
from kvtc_vllm.offload.geometry import CacheGeometry, writes_settled
from kvtc_vllm.offload.halver import Halver
from kvtc_vllm.offload.halving import HalvingPipeline
from kvtc_vllm.offload.kept_back import KeptBack
from kvtc_vllm.offload.loading import LoadPipeline
from kvtc_vllm.offload.messages import (
    NO_ADAPTER,
    AdapterUse,
    LoadItem,
    LoadJob,
    StepMetadata,
    StoreItem,
    WorkerReport,
)
from kvtc_vllm.offload.names import Names, Proof
from kvtc_vllm.offload.outbox import Outbox
from kvtc_vllm.offload.rank_context import RankContext
from kvtc_vllm.offload.stats import Stats
from kvtc_vllm.offload.storing import StorePipeline
from kvtc_vllm.offload.transfer import Transfer
from kvtc_vllm.offload.unsettled import Unsettled
from kvtc_vllm.tiers.blob_store import Blob, MemoryStore
from kvtc_vllm.tiers.inventory import Inventory
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.memory import MemoryArena
from kvtc_vllm.tiers.once_store import OnceStore
from kvtc_vllm.tiers.shared_arena import SharedArena, SharedView

logger = logging.getLogger("vllm.kvtc")

SHUTDOWN_SECONDS = 3.0
"""For writing to disk what waits when the engine stops; vLLM kills its processes after 5."""
IDLE_WAIT_SECONDS = 0.005
"""How long an otherwise empty step waits for a thread, instead of spinning."""


class _RunningLoad(NamedTuple):
    """request_id: whose it is. blocks: all that it fills. adapter, changes: what computed its
    chunks, see `Names`."""

    request_id: str
    blocks: list[int]
    adapter: AdapterUse
    changes: int


class KVTCWorker:
    """One rank's part of the tier.

    transfers: by cache group. device: where the paged cache is. staging_capacity: bytes that
    records may take between staging and encoding. rank: this worker's number among the engine's
    workers, 0-based. names: of what computes, made once already. disk: its part of the disk tier,
    if there is one. memory: instead of an arena of this rank's share of the configured bytes; a
    `SharedArena` where this rank keeps what all have the same. view: of that arena, where another
    rank does; this one has no memory or disk then. halver: makes blobs of a plain arena smaller.
    """

    def __init__(
        self,
        config: KVTCConfig,
        geometry: CacheGeometry,
        transfers: Sequence[Transfer],
        device: torch.device,
        staging_capacity: int,
        rank: int,
        names: Names,
        disk: DiskWorker | None = None,
        memory: MemoryStore | None = None,
        halver: Halver | None = None,
        view: SharedView | None = None,
    ) -> None:
        self._config = config
        self._view = view
        self._names = names
        self.transfers = transfers
        self._generation = b""
        self._unnamed = False
        self._running: dict[str, _RunningLoad] = {}
        self.failed_loads: set[str] = set()
        """Those of the requests that `poll` told last whose loads failed."""
        self._disk = disk
        self._rank = rank
        if memory is None:
            memory = MemoryArena(0 if view else config.memory_capacity // geometry.ranks)
        self.arena: MemoryStore = memory
        self.one_copy = view is not None or isinstance(memory, SharedArena)
        self._unsettled = Unsettled(writes_settled(config, geometry.ranks), staging_capacity)
        if disk is not None and isinstance(memory, OnceStore):
            disk.share_bodies(memory.tenant_of)
        self._step = StepMetadata()
        self._opened: StepMetadata | None = None
        # On a CPU vLLM computes a step before it starts its loads, from 0.29 on. Not with several
        # groups, whose blocks vLLM may have to clear first.
        self._forward_blocks = device.type == "cpu" and geometry.keeps_all
        self._proof: Proof | None = None
        self._kept = KeptBack()
        self._outbox = Outbox()
        context = RankContext(
            config,
            geometry,
            transfers,
            device,
            staging_capacity,
            rank,
            self.arena,
            disk,
            self._outbox,
            self._unsettled,
            None if halver is None else halver.times_halved,
            self.one_copy,
            view,
        )
        self._halver = halver
        self._halving: HalvingPipeline | None = None
        if halver is not None:
            assert isinstance(memory, MemoryArena)
            self._halving = HalvingPipeline(context, halver, memory)
        self._stores = StorePipeline(context)
        self._loads = LoadPipeline(context)

    def warm_up(self, stores: Sequence[StoreItem], loads: Sequence[LoadItem]) -> None:
        """Encode and load these on every thread that will, and keep nothing. Before any step.

        loads: of what was stored, in the same order. Also takes the samples of the weights that a
        step takes, which cross pinned memory.
        """
        for dense in (True, False):
            self._names.prove(0, self._outbox.epoch, dense=dense).holds  # noqa: B018
        blobs = self._stores.warm_up(stores)
        self._loads.warm_up(
            [
                (item, blob)
                for item, blob in zip(loads, blobs, strict=True)
                if not isinstance(blob, CodecError)
            ]
        )

    def before_forward(self, step: StepMetadata) -> None:
        """Apply reset and evictions, then copy the blocks that the step is going to overwrite.

        Before anything else in a step. Starts loads where the forward would keep them from
        starting.
        """
        self._opened = step
        self._kept.forget(step.gone)
        self._loads.give_up(step.give_up)
        self._open(step)
        # Before anything is staged: it needs the room, and may have the name of what goes.
        self._evict(step)
        early = [job for job in step.loads if self._may_begin_early(job)]
        if not step.stage_first and not early:
            return
        self._look_at_model(step)
        self._store(step, step.stage_first)
        self._load(step, early)

    def _may_begin_early(self, job: LoadJob) -> bool:
        """Whether its blocks and its adapter are by now what they are behind the forward."""
        return self._forward_blocks and job.adapter == NO_ADAPTER

    def begin_step(self, step: StepMetadata) -> None:
        """Do all that is to be done before the forward and was not; start promotions and loads."""
        if step is not self._opened:
            self.before_forward(step)
        self._opened = None
        self._open(step)
        if step.tokens or step.loads or step.stores:
            # Again, if it was before the forward: adapters may have been loaded since.
            self._look_at_model(step)
        if self._disk is not None:
            self._disk.touch(step.touch)
            self._disk.read(step.promote)
            if self._halver is not None:
                self._disk.halve(step.disk_halve, self._halver)
        elif self._view is not None and step.promote:
            with self._outbox.open() as out:  # the first rank reads for all
                out.report.stored += [(key, self._rank, 0) for key in step.promote]
        if self._halving is not None:
            self._halving.begin(step.halve, step.epoch)
        self._load(step, [job for job in step.loads if not self._may_begin_early(job)])

    def _evict(self, step: StepMetadata) -> None:
        """Forget what the scheduler evicted, after what is to be kept on disk went there."""
        if self._disk is not None:
            self._disk.remove(step.disk_remove)
            for key, blob in self._unsettled.held(step.demote, self.arena):
                self._disk.write(key, blob, step.epoch)
        self._unsettled.forget((*step.settled, *step.evict))
        self.arena.remove(step.evict)

    def _load(self, step: StepMetadata, jobs: Iterable[LoadJob]) -> None:
        for job in jobs:
            blocks = [block for item in job.items for block in item.block_ids]
            changes = self._names.changes
            load = _RunningLoad(job.request_id, blocks, job.adapter, changes)
            self._running[job.request_id] = load
            self._loads.begin(job, self._prove(step), self._is_loaded(job.adapter))

    def store(self, step: StepMetadata) -> None:
        """Copy the blocks that this step filled to staging and hand them to the encoders."""
        self._store(step, step.stores)
        if step.kept:
            proof = self._prove(step)
            self._kept.keep(step.kept, proof)
            self._loads.check(proof, self._kept.holds)

    def _open(self, step: StepMetadata) -> None:
        self._step = step
        self._stores.engine_computes(bool(step.tokens))
        if self._halving is not None:
            self._halving.engine_computes(bool(step.tokens))
        if step.epoch != self._outbox.epoch:
            self._begin_epoch(step)

    def _store(self, step: StepMetadata, items: Sequence[StoreItem]) -> None:
        if not items:
            return
        self._kept.forget(item.key for item in items)
        sound: list[StoreItem] = []
        others: list[StoreItem] = []
        for item in items:
            (sound if self._is_loaded(item.adapter) else others).append(item)
        self._stores.drop(others, step.epoch, "changed")
        self._stores.store(sound, step.epoch, self._kept.prove(self._prove(step)))

    def poll(self, idle: bool) -> set[str]:
        """Requests whose loads ended, well or not, since the last call."""
        if idle:
            self._outbox.wait(IDLE_WAIT_SECONDS)
        self._outbox.clear()
        if self._disk is not None:
            self._take_disk_news(self._disk)
        if self._step.adapters:
            # Only now: an adapter that is loaded may take the place of one that just computed.
            self._outbox.tell_adapters(self._names.adapters.load(self._step.adapters), self._rank)
        resized = self.arena.take_resized()
        if resized:
            with self._outbox.open() as out:
                out.report.resized += [(key, self._rank, size) for key, size in resized]
        finished = self._outbox.take_finished_loads()
        if finished:
            self._check_finished(finished)
        self.failed_loads = self._outbox.take_failed_loads(finished)
        return finished

    def take_bad_blocks(self) -> set[int]:
        """Blocks that were promised but could not be filled."""
        return self._outbox.take_bad_blocks()

    def take_report(self) -> WorkerReport | None:
        """What the scheduler has to know about chunks."""
        step, self._step = self._step, StepMetadata()  # said once
        report = self._outbox.take_report(step.number)
        report.loading = self._loads.take_pace()
        if isinstance(self.arena, SharedArena):
            report.placed = self.arena.places(key for key, _, _ in report.stored)
        if self._disk is not None:
            report.reading = self._disk.take_pace()
        return None if report.is_empty() and not step.tokens else report

    def take_stats(self) -> Stats | None:
        """Counters since the last call."""
        return self._outbox.take_stats()

    def shutdown(self) -> None:
        """Stop the threads; running work is finished, waiting work is dropped.

        What the disk tier lacks of memory and of the paged cache is written to it, for as long as
        there is time.
        """
        if self._halving is not None:
            self._halving.shutdown()
        if self._disk is None:
            self._stores.shutdown()
            self._loads.shutdown()
        else:
            started = time.monotonic()
            self._stores.shutdown(started + SHUTDOWN_SECONDS / 3)
            self._loads.shutdown()
            last = self._only_in_pages(started + SHUTDOWN_SECONDS * 2 / 3)
            behind = self._config.disk_write == "behind"
            # The newest first: what does not fit into the time is the least likely to return.
            settled = self._unsettled.settled_in(self.arena) if behind else ()
            held = self._unsettled.held(settled, self.arena)
            self._disk.close(chain(last, held), started + SHUTDOWN_SECONDS - time.monotonic())
        self._names.release()

    def inventory(self) -> Inventory | None:
        """(key, bytes) of what this rank has on disk; None without a disk tier."""
        return None if self._disk is None else self._disk.inventory()

    def _only_in_pages(self, until: float) -> list[tuple[RecordKey, Blob]]:
        """What was put off and is in the paged cache only, newest first, encoded in time.

        Nothing where the memory of the cache or the weights may have been taken away, or where
        other ranks would have to agree.
        """
        kept = self._kept.take_all()
        if not kept or self._names.may_sleep or self._unsettled.matters:
            return []
        proof = self._names.prove(self._step.number, self._outbox.epoch)
        return self._stores.encode_now(kept, self._kept.prove(proof), until)

    def _begin_epoch(self, step: StepMetadata) -> None:
        self._outbox.begin_epoch(step.epoch)
        self.arena.clear()
        self._unsettled.clear()
        self._kept.clear()
        if self._disk is not None:
            self._disk.leave(step.epoch)
        self._generation = step.generation
        # Made by the first step that computes: until then the model may be asleep.
        self._unnamed = True

    def _look_at_model(self, step: StepMetadata) -> None:
        """Before anything is stored or loaded in a step: what computes, and has it a name?"""
        self._proof = None
        if self._unnamed:
            self._unnamed = False
            other_weights = self._names.rename(self._generation)
            if other_weights:
                logger.warning(
                    "kvtc: the model's weights have changed; what was stored before is not offered "
                    "any more, what is computed now goes under another name"
                )
            namespace = self._names.namespace(self._generation)
            if self._disk is not None and namespace is not None:
                self._disk.enter(namespace)
            with self._outbox.open() as out:
                out.report.named_in = step.number
                out.report.other_weights = other_weights
        self._outbox.tell_adapters(self._names.adapters.refresh(), self._rank)
        if step.check:
            self._loads.check(self._prove(step))

    def _prove(self, step: StepMetadata) -> Proof:
        """One sample a step serves all that it stores and loads."""
        if self._proof is None:
            items = (*step.stage_first, *step.stores)
            uses = [item.adapter for item in items] + [job.adapter for job in step.loads]
            numbers = [use.number for use in uses if use != NO_ADAPTER]
            self._proof = self._names.prove(step.number, step.epoch, numbers, step.check)
        return self._proof

    def _is_loaded(self, use: AdapterUse) -> bool:
        if use == NO_ADAPTER:
            return True
        return self._names.adapters.is_loaded(use.number, use.parts[self._rank])

    def _check_finished(self, finished: set[str]) -> None:
        """Weights or an adapter that changed while a load ran did not compute what it brought."""
        loads = [self._running.pop(name) for name in finished if name in self._running]
        self._outbox.tell_adapters(self._names.adapters.refresh(), self._rank)
        numbers = [load.adapter.number for load in loads if load.adapter != NO_ADAPTER]
        holds = True
        if self._step.tokens or not self._names.may_sleep:
            holds = self._names.prove(self._step.number, self._step.epoch, numbers).holds
        bad = [
            load
            for load in loads
            if not holds or load.changes != self._names.changes or not self._is_loaded(load.adapter)
        ]
        if bad:
            with self._outbox.open() as out:
                for load in bad:
                    out.bad_blocks.update(load.blocks)
                    out.failed_loads.add(load.request_id)
        if not holds and not self._unnamed:  # else the names of this epoch will tell
            self._outbox.found_stale(self._step.number, self._step.epoch)

    def _take_disk_news(self, disk: DiskWorker) -> None:
        news = disk.take_news()
        if news == NO_NEWS:
            return
        kept, failed = keep(news, self.arena)
        with self._outbox.open() as out:
            tell(out, news, self._rank, kept, failed)
