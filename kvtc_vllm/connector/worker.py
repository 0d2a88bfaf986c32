"""Worker side: gathers, encodes, keeps, decodes and scatters the chunks of one rank.

The engine's thread calls `begin_step`, `store`, `poll` and the `take_*` methods;
encoding and loading run on thread pools and publish their results into a
mailbox that the engine's thread empties once a step. Nothing here blocks a step
longer than the gather of the blocks to store.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import torch
from vllm.logger import init_logger

from kvtc_vllm.codec.codec import Coder
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.connector.disk import NO_NEWS, DiskSide
from kvtc_vllm.connector.geometry import CacheGeometry
from kvtc_vllm.connector.layout import PagedLayout
from kvtc_vllm.connector.messages import (
    DiskInventory,
    LoadItem,
    LoadJob,
    StepMetadata,
    StoreItem,
    WorkerReport,
)
from kvtc_vllm.connector.metrics import KVTCStats
from kvtc_vllm.connector.streams import SideStream
from kvtc_vllm.connector.threads import CpuShare, share_of_thread, thread_pool
from kvtc_vllm.tiers.memory import MemoryArena
from kvtc_vllm.tiers.policies import ChunkKey

logger = init_logger("vllm.kvtc")

SHUTDOWN_SECONDS = 3.0
"""For writing to disk what waits when the engine stops; vLLM kills its processes after 5."""
IDLE_WAIT_SECONDS = 0.005
"""How long an otherwise empty step waits for a thread, instead of spinning."""


@dataclass
class _Mailbox:
    """Results of the threads, until the engine's thread takes them."""

    stored: list[tuple[ChunkKey, int, int]] = field(default_factory=list)
    dropped: list[tuple[ChunkKey, int]] = field(default_factory=list)
    bad: list[ChunkKey] = field(default_factory=list)
    finished_loads: set[str] = field(default_factory=set)
    bad_blocks: set[int] = field(default_factory=set)
    disk_stored: list[tuple[ChunkKey, int, int]] = field(default_factory=list)
    disk_lost: list[ChunkKey] = field(default_factory=list)
    load_tokens: int = 0
    load_seconds: float = 0.0
    stats: KVTCStats = field(default_factory=KVTCStats)


@dataclass
class _Load:
    """A request's load. left: chunks that no thread has ended yet. at_once: threads for it.

    seconds: of all its chunks, without the time that they waited for a thread.
    """

    request_id: str
    tokens: int
    left: int
    at_once: int
    point: torch.cuda.Event | None
    failed: bool = False
    seconds: float = 0.0


class KVTCWorker:
    """One rank's part of the tier.

    rank: this worker's number among the engine's workers, 0-based. disk: its part of
    the disk tier, if there is one.
    """

    def __init__(
        self,
        config: KVTCConfig,
        geometry: CacheGeometry,
        layout: PagedLayout,
        codec: Coder,
        rank: int,
        disk: DiskSide | None = None,
    ) -> None:
        self._config = config
        self._disk = disk
        self._geometry = geometry
        self._layout = layout
        self.codec: Coder = codec
        self._rank = rank
        self.arena = MemoryArena(config.memory_capacity // geometry.tp_size)
        self._epoch = 0
        self._step = StepMetadata()
        self._staged = 0
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._mail = _Mailbox()
        self._encode_stream = SideStream(layout.device)
        self._load_stream = SideStream(layout.device)
        self._encoders = thread_pool("kvtc-encode", config.encode_threads, layout.device)
        self._encode_share = CpuShare(
            share_of_thread(
                config.encode_share, layout.device, config.encode_threads, geometry.tp_size
            )
        )
        self._loaders = thread_pool("kvtc-load", config.load_threads, layout.device)

    def begin_step(self, step: StepMetadata) -> None:
        """Apply reset and evictions, start this step's promotions and loads."""
        self._step = step
        self._encode_share.engine_computes(bool(step.tokens))
        if step.epoch != self._epoch:
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
            self._begin_load(job)

    def store(self, step: StepMetadata) -> None:
        """Copy finished blocks to staging and hand them to the encoders."""
        if not step.stores:
            return
        started = time.perf_counter()
        for item in step.stores:
            self._stage(item)
        self._count("gather_seconds", time.perf_counter() - started)

    def poll(self, idle: bool) -> set[str]:
        """Requests whose loads ended, well or not, since the last call."""
        if idle:
            self._news.wait(IDLE_WAIT_SECONDS)
        self._news.clear()
        if self._disk is not None:
            self._take_disk_news(self._disk)
        with self._lock:
            finished, self._mail.finished_loads = self._mail.finished_loads, set()
        return finished

    def take_bad_blocks(self) -> set[int]:
        """Blocks that were promised but could not be filled."""
        with self._lock:
            bad, self._mail.bad_blocks = self._mail.bad_blocks, set()
        return bad

    def take_report(self) -> WorkerReport | None:
        """What the scheduler has to know about chunks."""
        step, self._step = self._step, StepMetadata()  # said once
        with self._lock:
            mail = self._mail
            report = WorkerReport(
                self._epoch,
                mail.stored,
                mail.dropped,
                mail.bad,
                mail.disk_stored,
                mail.disk_lost,
                mail.load_tokens,
                mail.load_seconds,
                step.number,
            )
            if report.is_empty() and not step.tokens:
                return None
            self._mail = _Mailbox(
                finished_loads=mail.finished_loads, bad_blocks=mail.bad_blocks, stats=mail.stats
            )
        return report

    def take_stats(self) -> KVTCStats | None:
        """Counters since the last call."""
        with self._lock:
            if self._mail.stats.is_empty():
                return None
            stats, self._mail.stats = self._mail.stats, KVTCStats()
        return stats

    def shutdown(self) -> None:
        """Stop the threads; running work is finished, waiting work is dropped."""
        self._encode_share.engine_computes(False)
        for pool in (self._encoders, self._loaders):
            pool.shutdown(wait=True, cancel_futures=True)
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
        with self._lock:
            self._epoch = epoch
            mail = self._mail
            self._mail = _Mailbox(
                finished_loads=mail.finished_loads, bad_blocks=mail.bad_blocks, stats=mail.stats
            )
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
        with self._lock:
            mail, rank = self._mail, self._rank
            mail.stored += [(key, rank, size) for key, size in kept]
            mail.dropped += [(key, rank) for key in failed]
            mail.disk_stored += [(key, rank, size) for key, size in news.stored]
            mail.disk_lost += news.lost
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

    def _stage(self, item: StoreItem) -> None:
        size = len(item.block_ids) * self._geometry.block_size * self._geometry.token_bytes
        with self._lock:
            room = self._staged + size <= self._config.staging_capacity
            if room:
                self._staged += size
        if not room:
            self._drop(item, self._epoch, "staging_full")
            return
        pages = self._layout.copy(item.block_ids)
        self._encoders.submit(self._encode, item, pages, self._epoch, self._encode_stream.mark())

    def _encode(
        self,
        item: StoreItem,
        pages: torch.Tensor,
        epoch: int,
        point: torch.cuda.Event | None,
    ) -> None:
        raw = pages.nbytes
        started = time.perf_counter()
        try:
            with self._encode_stream.after(point):
                self._encode_stream.adopt(pages)
                k, v = self._layout.unpack(pages)
                blob = self.codec.encode(k, v, item.start, item.key)
            with self._lock:  # against a reset between the check and the put
                kept = epoch == self._epoch and self.arena.put(item.key, blob)
        except CodecError as error:
            reason = "non_finite" if "non-finite" in str(error) else "error"
            logger.warning("kvtc: chunk at token %d not stored: %s", item.start, error)
            self._drop(item, epoch, reason)
        except Exception:
            logger.exception("kvtc: chunk at token %d not stored", item.start)
            self._drop(item, epoch, "error")
        else:
            if kept:
                self._publish_store(item, len(blob), raw, epoch)
                if self._disk is not None and self._config.disk_write == "through":
                    self._disk.write(item.key, blob, epoch)
            else:
                self._drop(item, epoch, "tier_full")
        finally:
            seconds = time.perf_counter() - started
            with self._lock:
                self._staged -= raw
                self._mail.stats.add("encode_seconds", seconds)
            self._news.set()
            self._encode_share.pay(seconds)

    def _publish_store(self, item: StoreItem, size: int, raw: int, epoch: int) -> None:
        with self._lock:
            if epoch == self._epoch:
                self._mail.stored.append((item.key, self._rank, size))
            self._mail.stats.add("stored_chunks")
            self._mail.stats.add("stored_raw_bytes", raw)
            self._mail.stats.add("stored_bytes", size)

    def _drop(self, item: StoreItem, epoch: int, reason: str) -> None:
        with self._lock:
            if epoch == self._epoch:
                self._mail.dropped.append((item.key, self._rank))
            self._mail.stats.add("dropped_stores", label=reason)
        self._news.set()

    def _begin_load(self, job: LoadJob) -> None:
        request = _Load(
            request_id=job.request_id,
            tokens=sum(len(item.block_ids) for item in job.items) * self._geometry.block_size,
            left=len(job.items),
            at_once=min(len(job.items), self._config.load_threads),
            point=self._load_stream.mark(),
        )
        for item in job.items:
            self._loaders.submit(self._load, item, request)

    def _load(self, item: LoadItem, request: _Load) -> None:
        """Fill the blocks of one chunk; the last of a request ends its load.

        After a failure vLLM recomputes all that follows, so the rest isn't tried.
        """
        started = time.perf_counter()
        reason = None if request.failed else self._try_load(item, request)
        with self._lock:
            seconds = time.perf_counter() - started
            request.seconds += seconds
            self._mail.stats.add("decode_seconds", seconds)
            if reason is not None:
                request.failed = True
                self._mail.bad.append(item.key)
                if reason != "missing":
                    # What is on disk is the same blob: offered again, it would fail again.
                    self._mail.disk_lost.append(item.key)
                self._mail.stats.add("failed_loads", label=reason)
            if request.failed:
                self._mail.bad_blocks.update(item.block_ids)
            request.left -= 1
            if request.left:
                return
            self._mail.finished_loads.add(request.request_id)
            if not request.failed:
                self._mail.load_tokens += request.tokens
                self._mail.load_seconds += request.seconds / request.at_once
        self._news.set()

    def _try_load(self, item: LoadItem, request: _Load) -> str | None:
        """The reason why it failed, if it did. Nothing of it may get past here."""
        try:
            self._load_chunk(item, request.point)
        except ContainerError as error:
            logger.warning(
                "kvtc: chunk at token %d of request %s is unusable, recomputing: %s",
                item.start,
                request.request_id,
                error,
            )
            return error.reason
        except Exception:
            logger.exception(
                "kvtc: loading the chunk at token %d of request %s failed, recomputing",
                item.start,
                request.request_id,
            )
            return "error"
        return None

    def _load_chunk(self, item: LoadItem, point: torch.cuda.Event | None) -> None:
        blob = self.arena.get(item.key)
        if blob is None:
            raise ContainerError("missing", "the chunk is not in the tier")
        size = self._geometry.block_size
        wanted = slice(item.first_block * size, (item.first_block + len(item.block_ids)) * size)
        with self._load_stream.after(point):
            chunk = self.codec.decode(
                blob,
                expect_start=item.start,
                expect_tokens=self._config.chunk_tokens,
                key=item.key,
            )
            k, v = chunk.k[wanted], chunk.v[wanted]
            self._layout.scatter(item.block_ids, k, v)
        with self._lock:
            self._mail.stats.add("loaded_chunks")
            self._mail.stats.add("loaded_tokens", k.shape[0])
            self._mail.stats.add("loaded_raw_bytes", k.nbytes + v.nbytes)
            self._mail.stats.add("loaded_bytes", len(blob))

    def _count(self, name: str, amount: float) -> None:
        with self._lock:
            self._mail.stats.add(name, amount)
