"""Worker side: the tiers of one rank, and the pipelines into and out of them.

The engine's thread calls `begin_step`, `store`, `poll` and the `take_*` methods;
encoding, loading and the disk have threads of their own and leave their results in
a mailbox that the engine's thread empties once a step. Nothing here blocks a step
longer than the staging of the blocks to store.
"""

from __future__ import annotations

import torch

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.connector.disk import NO_NEWS, DiskSide
from kvtc_vllm.connector.geometry import CacheGeometry
from kvtc_vllm.connector.loading import LoadPipeline
from kvtc_vllm.connector.mailbox import Mailbox
from kvtc_vllm.connector.messages import DiskInventory, StepMetadata, WorkerReport
from kvtc_vllm.connector.metrics import KVTCStats
from kvtc_vllm.connector.storing import StorePipeline
from kvtc_vllm.connector.transfer import Transfer
from kvtc_vllm.tiers.memory import MemoryArena

SHUTDOWN_SECONDS = 3.0
"""For writing to disk what waits when the engine stops; vLLM kills its processes after 5."""
IDLE_WAIT_SECONDS = 0.005
"""How long an otherwise empty step waits for a thread, instead of spinning."""


class KVTCWorker:
    """One rank's part of the tier.

    device: where the paged cache is. staging_capacity: see `StorePipeline`. rank: this worker's
    number among the engine's workers, 0-based. disk: its part of the disk tier, if there is one.
    """

    def __init__(
        self,
        config: KVTCConfig,
        geometry: CacheGeometry,
        transfer: Transfer,
        device: torch.device,
        staging_capacity: int,
        rank: int,
        disk: DiskSide | None = None,
    ) -> None:
        self._config = config
        self._disk = disk
        self._rank = rank
        self.arena = MemoryArena(config.memory_capacity // geometry.tp_size)
        self._step = StepMetadata()
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

    def exchange_transfer(self, transfer: Transfer) -> None:
        """Use another one from now on; before the first step."""
        self._stores.transfer = self._loads.transfer = transfer

    def begin_step(self, step: StepMetadata) -> None:
        """Apply reset and evictions, start this step's promotions and loads."""
        self._step = step
        self._stores.engine_computes(bool(step.tokens))
        if step.epoch != self._mailbox.epoch:
            self._begin_epoch(step.epoch)
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
            self._loads.begin(job)

    def store(self, step: StepMetadata) -> None:
        """Copy finished blocks to staging and hand them to the encoders."""
        if step.stores:
            self._stores.store(step.stores, step.epoch)

    def poll(self, idle: bool) -> set[str]:
        """Requests whose loads ended, well or not, since the last call."""
        if idle:
            self._mailbox.wait(IDLE_WAIT_SECONDS)
        self._mailbox.heard()
        if self._disk is not None:
            self._take_disk_news(self._disk)
        return self._mailbox.take_finished_loads()

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

    def _begin_epoch(self, epoch: int) -> None:
        self._mailbox.begin_epoch(epoch)
        self.arena.clear()
        if self._disk is not None:
            self._disk.begin_epoch(epoch)

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
            mail.report.disk_stored += [(key, self._rank, size) for key, size in news.stored]
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
