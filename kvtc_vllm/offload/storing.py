"""Paged cache -> memory: staging on the engine's thread, encoding on threads of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.codec.streams import Event, SideStream
from kvtc_vllm.offload.messages import StoreItem
from kvtc_vllm.offload.names import Proof
from kvtc_vllm.offload.rank_context import RankContext, batches, failure_reason
from kvtc_vllm.offload.threads import (
    Throttle,
    on_every_thread,
    share_of_thread,
    thread_pool,
)
from kvtc_vllm.offload.transfer import Staged
from kvtc_vllm.tiers.blob_store import StoreError
from kvtc_vllm.tiers.delta_store import DeltaStore, Prepared
from kvtc_vllm.tiers.keys import RecordKey

logger = logging.getLogger("vllm.kvtc")

LAST_BATCH = 4
"""Records that are encoded at once when the engine stops, so that time is kept."""


class StorePipeline:
    """The stores of one rank. What finds no room in staging memory is dropped and counted."""

    def __init__(self, context: RankContext) -> None:
        config, device = context.config, context.device
        self._transfers = context.transfers
        self._groups = context.geometry.groups
        self._capacity = context.staging_capacity
        self._rank = context.rank
        self._memory = context.memory
        self._delta = context.memory if isinstance(context.memory, DeltaStore) else None
        self._unsettled = context.unsettled
        through = config.disk_write == "through" and not self._unsettled.matters
        self._write_through = context.disk if through else None  # else the scheduler says when
        self._keeps = context.view is None
        self._outbox = context.outbox
        self._staged = 0
        self._lock = threading.Lock()
        self._stream = SideStream(device)
        self._share = Throttle(
            share_of_thread(config.encode_share, device, config.encode_threads, context.keepers)
        )
        self._num_threads = config.encode_threads
        self._threads = thread_pool("kvtc-encode", self._num_threads, device)

    def engine_computes(self, busy: bool) -> None:
        """Whether the engine has work of its own in this step."""
        self._share.engine_computes(busy)

    def store(self, items: Sequence[StoreItem], epoch: int, proof: Proof) -> None:
        """Copy blocks to staging memory and hand them to the encoders. Engine's thread.

        items: first to last of each prefix. Where another rank keeps them for all, what is looked
        at is only whether they are of what computes here.
        """
        if not self._keeps:
            self._threads.submit(self._witness, items, epoch, proof)
            return
        started = time.perf_counter()
        taken = self._with_room(items)
        self.drop(items[len(taken) :], epoch, "staging_full")
        for batch in batches(taken, [transfer.store_batch for transfer in self._transfers]):
            self._stage(batch, epoch, proof)
        self._outbox.count("gather_seconds", time.perf_counter() - started)

    def drop(self, items: Sequence[StoreItem], epoch: int, reason: str) -> None:
        """Give stores up. Any thread."""
        for item in items:
            self._drop(item, epoch, reason)

    def warm_up(self, items: Sequence[StoreItem]) -> Sequence[Blob | CodecError]:
        """Stage records of one cache group and encode them on every thread."""
        transfer = self._transfers[items[0].group]
        staged = transfer.stage(items)
        point = Event(self._stream.device)

        def encode() -> Sequence[Blob | CodecError]:
            with self._stream.to_end(point):
                self._stream.adopt(*staged.tensors)
                return transfer.encode(staged)

        return on_every_thread(self._threads, self._num_threads, encode)[0]

    def encode_now(
        self, items: Sequence[StoreItem], proof: Proof, until: float
    ) -> list[tuple[RecordKey, Blob]]:
        """Encode records on the engine's thread, the first first; what fails is left out.

        until: on the monotonic clock, after which no more are begun. None if the proof fails.
        """
        blobs: list[tuple[RecordKey, Blob]] = []
        if not items or not proof.holds:
            return blobs
        for batch in batches(items, [LAST_BATCH] * len(self._transfers)):
            if time.monotonic() >= until:
                break
            try:
                transfer = self._transfers[batch[0].group]
                found = transfer.encode(transfer.stage(batch))
            except Exception as error:  # what is left can still be written
                logger.warning("kvtc: %d chunks not stored: %s", len(batch), error)
                continue
            for item, blob in zip(batch, found, strict=True):
                if isinstance(blob, CodecError):
                    logger.warning("kvtc: chunk at token %d not stored: %s", item.start, blob)
                else:
                    blobs.append((item.key, blob))
        return blobs

    def shutdown(self, until: float | None = None) -> None:
        """Finish what runs; drop what waits, after `until` on the monotonic clock if given."""
        self._share.engine_computes(False)
        while until is not None and self._waits and time.monotonic() < until:
            self._outbox.wait(until - time.monotonic())
            self._outbox.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)

    @property
    def _waits(self) -> bool:
        with self._lock:
            return self._staged > 0

    def _with_room(self, items: Sequence[StoreItem]) -> Sequence[StoreItem]:
        """The first items, for which there is staging memory; it is theirs now.

        In this order, because a prefix is of use up to its first gap.
        """
        with self._lock:
            for index, item in enumerate(items):
                size = self._staged_bytes((item,))
                if self._staged + size > self._capacity:
                    return items[:index]
                self._staged += size
        return items

    def _staged_bytes(self, items: Sequence[StoreItem]) -> int:
        return sum(self._transfers[item.group].staged_bytes(len(item.block_ids)) for item in items)

    def _release(self, items: Sequence[StoreItem]) -> None:
        with self._lock:
            self._staged -= self._staged_bytes(items)

    def _witness(self, items: Sequence[StoreItem], epoch: int, proof: Proof) -> None:
        """Report that nothing speaks against a store of another rank, or that something does."""
        try:
            holds = proof.holds
        except Exception:
            logger.exception("kvtc: %d chunks not stored", len(items))
            self.drop(items, epoch, "error")
            return
        if not holds:
            self._outbox.found_stale(proof.step, proof.epoch)
            self.drop(items, epoch, "changed")
            return
        with self._outbox.open() as out:
            if epoch == out.report.epoch:
                out.report.stored += [(item.key, self._rank, 0) for item in items]
        self._outbox.notify()

    def _stage(self, items: Sequence[StoreItem], epoch: int, proof: Proof) -> None:
        try:
            staged = self._transfers[items[0].group].stage(items)
        except Exception as error:  # the engine's step must go on
            logger.warning("kvtc: %d chunks not stored: %s", len(items), error)
            self.drop(items, epoch, failure_reason(error))
            self._release(items)
            return
        point = Event(self._stream.device)
        self._threads.submit(self._encode, items, staged, epoch, proof, point)

    def _encode(
        self,
        items: Sequence[StoreItem],
        staged: Staged,
        epoch: int,
        proof: Proof,
        point: Event,
    ) -> None:
        started, settled = time.perf_counter(), 0
        try:
            with self._stream.to_end(point):
                self._stream.adopt(*staged.tensors)
                blobs = self._transfers[items[0].group].encode(staged)
            if not proof.holds:
                self._outbox.found_stale(proof.step, proof.epoch)
                self.drop(items, epoch, "changed")
                return
            for item, blob in zip(items, blobs, strict=True):
                self._keep(item, blob, epoch)
                settled += 1
        except Exception as error:
            # Whatever it is: a store without an outcome keeps its room, and an idle engine awake.
            logger.exception("kvtc: %d chunks not stored", len(items) - settled)
            self.drop(items[settled:], epoch, failure_reason(error))
        finally:
            seconds = time.perf_counter() - started
            self._release(items)
            self._outbox.count("encode_seconds", seconds)
            self._outbox.notify()
            self._share.charge(seconds)

    def _keep(self, item: StoreItem, blob: Blob | CodecError, epoch: int) -> None:
        if isinstance(blob, CodecError):
            logger.warning("kvtc: chunk at token %d not stored: %s", item.start, blob)
            self._drop(item, epoch, "non_finite" if blob.reason == "non_finite" else "error")
            return
        new = blob if self._delta is None else self._prepare(self._delta, item, blob)
        with self._outbox.open() as out:  # against a reset between the check and the write
            size = self._write(item, new) if epoch == out.report.epoch else None
            if size is not None:
                self._unsettled.add(item.key, None if self._delta is None else blob)
                group = self._groups[item.group]
                out.report.stored.append((item.key, self._rank, size))
                out.stats.add("stored_chunks")
                raw = group.raw_bytes(item.block_ids)
                out.stats.add("stored_raw_bytes", raw)
                out.stats.add("stored_bytes", size)
                out.stats.add("kind_stored_raw_bytes", raw, group.kind)
                out.stats.add("kind_stored_bytes", size, group.kind)
                if size < len(blob):
                    how = "shared" if self._delta is None else "delta"
                    out.stats.add(f"{how}_chunks")
                    out.stats.add(f"{how}_bytes", len(blob) - size)
        if size is None:
            self._drop(item, epoch, "tier_full")
        elif self._write_through is not None:
            self._write_through.write(item.key, blob, epoch)

    @staticmethod
    def _prepare(delta: DeltaStore, item: StoreItem, blob: Blob) -> Prepared:
        return delta.prepare(item.key, blob, item.tenant, item.tokens)

    def _write(self, item: StoreItem, blob: Blob | Prepared) -> int | None:
        """The bytes that memory keeps for it; None if there is no room."""
        try:
            if isinstance(blob, Prepared):
                assert self._delta is not None
                return self._delta.write(item.key, blob, item.tenant)
            return self._memory.write(item.key, blob, item.tenant)
        except StoreError:
            return None

    def _drop(self, item: StoreItem, epoch: int, reason: str) -> None:
        with self._outbox.open() as out:
            if epoch == out.report.epoch:
                out.report.dropped.append((item.key, self._rank))
            out.stats.add("dropped_stores", label=reason)
        self._outbox.notify()
