"""Paged cache -> memory tier: staging on the engine's thread, encoding on threads of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch
from vllm.logger import init_logger

from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.codec.kernels.streams import Event, SideStream
from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.connector.disk import DiskSide
from kvtc_vllm.connector.geometry import CacheGeometry
from kvtc_vllm.connector.mailbox import Mailbox
from kvtc_vllm.connector.messages import StoreItem
from kvtc_vllm.connector.names import Proof
from kvtc_vllm.connector.threads import CpuShare, share_of_thread, thread_pool
from kvtc_vllm.connector.transfer import Staged, Transfer
from kvtc_vllm.tiers.memory import MemoryArena

logger = init_logger("vllm.kvtc")


class StorePipeline:
    """The stores of one rank.

    staging_capacity: bytes that chunks may take between staging and encoding; what finds no room
    is dropped and counted.
    """

    def __init__(
        self,
        config: KVTCConfig,
        geometry: CacheGeometry,
        transfer: Transfer,
        device: torch.device,
        staging_capacity: int,
        rank: int,
        arena: MemoryArena,
        disk: DiskSide | None,
        mailbox: Mailbox,
    ) -> None:
        self.transfer = transfer
        self._geometry = geometry
        self._capacity = staging_capacity
        self._rank = rank
        self._arena = arena
        self._write_through = disk if config.disk_write == "through" else None
        self._mailbox = mailbox
        self._staged = 0
        self._lock = threading.Lock()
        self._stream = SideStream(device)
        self._share = CpuShare(
            share_of_thread(config.encode_share, device, config.encode_threads, geometry.tp_size)
        )
        self._threads = thread_pool("kvtc-encode", config.encode_threads, device)

    def engine_computes(self, busy: bool) -> None:
        """Whether the engine has work of its own in this step."""
        self._share.engine_computes(busy)

    def store(self, items: Sequence[StoreItem], epoch: int, proof: Proof) -> None:
        """Copy finished blocks to staging and hand them to the encoders. Engine's thread."""
        started = time.perf_counter()
        taken = self._with_room(items)
        self.drop(items[len(taken) :], epoch, "staging_full")
        size = self.transfer.store_batch
        for first in range(0, len(taken), size):
            self._stage(taken[first : first + size], epoch, proof)
        self._mailbox.count("gather_seconds", time.perf_counter() - started)

    def drop(self, items: Sequence[StoreItem], epoch: int, reason: str) -> None:
        """Give stores up. Any thread."""
        for item in items:
            self._drop(item, epoch, reason)

    def shutdown(self) -> None:
        """Finish what runs, drop what waits."""
        self._share.engine_computes(False)
        self._threads.shutdown(wait=True, cancel_futures=True)

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
        return sum(self.transfer.staged_bytes(len(item.block_ids)) for item in items)

    def _release(self, items: Sequence[StoreItem]) -> None:
        with self._lock:
            self._staged -= self._staged_bytes(items)

    def _stage(self, items: Sequence[StoreItem], epoch: int, proof: Proof) -> None:
        try:
            staged = self.transfer.stage(items)
        except Exception as error:  # the engine's step must go on
            memory = isinstance(error, torch.OutOfMemoryError)
            logger.warning("kvtc: %d chunks not stored: %s", len(items), error)
            self.drop(items, epoch, "out_of_memory" if memory else "error")
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
        started = time.perf_counter()
        try:
            with self._stream.after(point):
                self._stream.adopt(*staged.tensors)
                blobs = self.transfer.encode(staged)
            self._stream.synchronize()
        except Exception:
            logger.exception("kvtc: %d chunks not stored", len(items))
            self.drop(items, epoch, "error")
        else:
            if not proof.holds:
                self._mailbox.found_stale(proof.step, proof.epoch)
                self.drop(items, epoch, "changed")
                return
            for item, blob in zip(items, blobs, strict=True):
                self._keep(item, blob, epoch)
        finally:
            seconds = time.perf_counter() - started
            self._release(items)
            self._mailbox.count("encode_seconds", seconds)
            self._mailbox.ring()
            self._share.pay(seconds)

    def _keep(self, item: StoreItem, blob: bytes | CodecError, epoch: int) -> None:
        if isinstance(blob, CodecError):
            logger.warning("kvtc: chunk at token %d not stored: %s", item.start, blob)
            self._drop(item, epoch, "non_finite" if blob.reason == "non_finite" else "error")
            return
        with self._mailbox.open() as mail:  # against a reset between the check and the put
            kept = epoch == mail.report.epoch and self._arena.put(item.key, blob)
            if kept:
                tokens = len(item.block_ids) * self._geometry.block_size
                mail.report.stored.append((item.key, self._rank, len(blob)))
                mail.stats.add("stored_chunks")
                mail.stats.add("stored_raw_bytes", tokens * self._geometry.token_bytes)
                mail.stats.add("stored_bytes", len(blob))
        if not kept:
            self._drop(item, epoch, "tier_full")
        elif self._write_through is not None:
            self._write_through.write(item.key, blob, epoch)

    def _drop(self, item: StoreItem, epoch: int, reason: str) -> None:
        with self._mailbox.open() as mail:
            if epoch == mail.report.epoch:
                mail.report.dropped.append((item.key, self._rank))
            mail.stats.add("dropped_stores", label=reason)
        self._mailbox.ring()
