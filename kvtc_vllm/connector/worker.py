"""Worker side: the tiers of one rank, and the pipelines into and out of them.

The engine's thread calls `begin_step`, `store`, `poll` and the `take_*` methods;
encoding, loading and the disk have threads of their own and leave their results in
a mailbox that the engine's thread empties once a step. Nothing here blocks a step
longer than the staging of the blocks to store.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from vllm.logger import init_logger

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.connector.disk import NO_NEWS, DiskSide
from kvtc_vllm.connector.geometry import CacheGeometry
from kvtc_vllm.connector.loading import LoadPipeline
from kvtc_vllm.connector.mailbox import Mailbox
from kvtc_vllm.connector.messages import (
    NO_ADAPTER,
    AdapterUse,
    DiskInventory,
    StepMetadata,
    StoreItem,
    WorkerReport,
)
from kvtc_vllm.connector.metrics import KVTCStats
from kvtc_vllm.connector.names import Names, Proof
from kvtc_vllm.connector.storing import StorePipeline
from kvtc_vllm.connector.transfer import Transfer
from kvtc_vllm.tiers.memory import MemoryArena

logger = init_logger("vllm.kvtc")

SHUTDOWN_SECONDS = 3.0
"""For writing to disk what waits when the engine stops; vLLM kills its processes after 5."""
IDLE_WAIT_SECONDS = 0.005
"""How long an otherwise empty step waits for a thread, instead of spinning."""


class _RunningLoad(NamedTuple):
    """blocks: all that it fills. adapter, changes: what computed its chunks, see `Names`."""

    blocks: list[int]
    adapter: AdapterUse
    changes: int


class KVTCWorker:
    """One rank's part of the tier.

    device: where the paged cache is. staging_capacity: see `StorePipeline`. rank: this worker's
    number among the engine's workers, 0-based. names: of what computes, made once already. disk:
    its part of the disk tier, if there is one.
    """

    def __init__(
        self,
        config: KVTCConfig,
        geometry: CacheGeometry,
        transfer: Transfer,
        device: torch.device,
        staging_capacity: int,
        rank: int,
        names: Names,
        disk: DiskSide | None = None,
    ) -> None:
        self._config = config
        self._names = names
        self._generation = b""
        self._unnamed = False
        self._running: dict[str, _RunningLoad] = {}
        self._disk = disk
        self._rank = rank
        self.arena = MemoryArena(config.memory_capacity // geometry.tp_size)
        self._step = StepMetadata()
        self._proof: Proof | None = None
        self._mailbox = Mailbox()
        self._stores = StorePipeline(
            config,
            geometry,
            transfer,
            device,
            staging_capacity,
            rank,
            self.arena,
            disk,
            self._mailbox,
        )
        self._loads = LoadPipeline(config, geometry, transfer, device, self.arena, self._mailbox)

    @property
    def transfer(self) -> Transfer:
        """How chunks get from the paged cache to blobs and back."""
        return self._stores.transfer

    def begin_step(self, step: StepMetadata) -> None:
        """Apply reset and evictions, start this step's promotions and loads."""
        self._step = step
        self._stores.engine_computes(bool(step.tokens))
        if step.epoch != self._mailbox.epoch:
            self._begin_epoch(step)
        if step.tokens or step.loads or step.stores:
            self._look_at_model(step)
        if self._disk is not None:
            for key in step.demote:
                blob = self.arena.get(key)
                if blob is not None:
                    self._disk.write(key, blob, step.epoch)
            self._disk.remove(step.disk_remove)
            self._disk.touch(step.touch)
            self._disk.read(step.promote)
        self.arena.remove(step.evict)
        for job in step.loads:
            blocks = [block for item in job.items for block in item.block_ids]
            self._running[job.request_id] = _RunningLoad(blocks, job.adapter, self._names.changes)
            self._loads.begin(job, self._prove(step), self._is_loaded(job.adapter))

    def store(self, step: StepMetadata) -> None:
        """Copy finished blocks to staging and hand them to the encoders."""
        if not step.stores:
            return
        sound: list[StoreItem] = []
        others: list[StoreItem] = []
        for item in step.stores:
            (sound if self._is_loaded(item.adapter) else others).append(item)
        self._stores.drop(others, step.epoch, "changed")
        self._stores.store(sound, step.epoch, self._prove(step))

    def poll(self, idle: bool) -> set[str]:
        """Requests whose loads ended, well or not, since the last call."""
        if idle:
            self._mailbox.wait(IDLE_WAIT_SECONDS)
        self._mailbox.heard()
        if self._disk is not None:
            self._take_disk_news(self._disk)
        if self._step.adapters:
            # Only now: an adapter that is loaded may take the place of one that just computed.
            self._tell_adapters(self._names.adapters.load(self._step.adapters))
        finished = self._mailbox.take_finished_loads()
        if finished:
            self._check_finished(finished)
        return finished

    def take_bad_blocks(self) -> set[int]:
        """Blocks that were promised but could not be filled."""
        return self._mailbox.take_bad_blocks()

    def take_report(self) -> WorkerReport | None:
        """What the scheduler has to know about chunks."""
        step, self._step = self._step, StepMetadata()  # said once
        report = self._mailbox.take_report(step.number)
        return None if report.is_empty() and not step.tokens else report

    def take_stats(self) -> KVTCStats | None:
        """Counters since the last call."""
        return self._mailbox.take_stats()

    def shutdown(self) -> None:
        """Stop the threads; running work is finished, waiting work is dropped."""
        self._names.release()
        self._stores.shutdown()
        self._loads.shutdown()
        if self._disk is not None:
            behind = self._config.disk_write == "behind"
            # The newest first: what does not fit into the time is the least likely to return.
            keys = reversed(self.arena.keys()) if behind else ()
            blobs = ((key, self.arena.get(key)) for key in keys)
            self._disk.close(((k, b) for k, b in blobs if b is not None), SHUTDOWN_SECONDS)

    def inventory(self) -> DiskInventory | None:
        """What this rank has on disk, for the scheduler; None without a disk tier."""
        return None if self._disk is None else DiskInventory(self._disk.inventory())

    def _begin_epoch(self, step: StepMetadata) -> None:
        self._mailbox.begin_epoch(step.epoch)
        self.arena.clear()
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
            with self._mailbox.open() as mail:
                mail.report.named_in = step.number
                mail.report.other_weights = other_weights
        self._tell_adapters(self._names.adapters.refresh())
        if step.check:
            self._loads.check(self._prove(step))

    def _prove(self, step: StepMetadata) -> Proof:
        """One sample a step serves all that it stores and loads."""
        if self._proof is None:
            uses = [item.adapter for item in step.stores] + [job.adapter for job in step.loads]
            numbers = [use.number for use in uses if use != NO_ADAPTER]
            self._proof = self._names.prove(step.number, step.epoch, numbers, step.check)
        return self._proof

    def _is_loaded(self, use: AdapterUse) -> bool:
        if use == NO_ADAPTER:
            return True
        return self._names.adapters.is_loaded(use.number, use.parts[self._rank])

    def _tell_adapters(self, news: dict[int, bytes | None]) -> None:
        if news:
            with self._mailbox.open() as mail:
                for number, digest in news.items():
                    mail.report.adapters[number] = {self._rank: digest}

    def _check_finished(self, finished: set[str]) -> None:
        """Weights or an adapter that changed while a load ran did not compute what it brought."""
        loads = [self._running.pop(name) for name in finished if name in self._running]
        self._tell_adapters(self._names.adapters.refresh())
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
            with self._mailbox.open() as mail:
                for load in bad:
                    mail.bad_blocks.update(load.blocks)
        if not holds and not self._unnamed:  # else the names of this epoch will tell
            self._mailbox.found_stale(self._step.number, self._step.epoch)

    def _take_disk_news(self, disk: DiskSide) -> None:
        news = disk.take_news()
        if news == NO_NEWS:
            return
        kept = [(key, len(blob)) for key, blob in news.read if self.arena.put(key, blob)]
        held = {key for key, _ in kept}
        failed = [*news.failed, *(key for key, _ in news.read if key not in held)]
        with self._mailbox.open() as mail:
            mail.report.stored += [(key, self._rank, size) for key, size in kept]
            mail.report.dropped += [(key, self._rank) for key in failed]
            on_disk = [*news.found, *news.stored]
            mail.report.disk_stored += [(key, self._rank, size) for key, size in on_disk]
            mail.report.disk_lost += news.lost
            for name, amount in (
                ("promoted_chunks", len(kept)),
                ("promoted_bytes", sum(size for _, size in kept)),
                ("disk_written_chunks", len(news.stored)),
                ("disk_written_bytes", news.written_bytes),
            ):
                if amount:
                    mail.stats.add(name, amount)
            for reason, count in news.errors.items():
                mail.stats.add("disk_errors", count, label=reason)
