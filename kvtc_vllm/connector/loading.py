"""Memory tier -> paged cache, on threads of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.logger import init_logger

from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kernels.streams import Event, SideStream
from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.connector.geometry import CacheGeometry
from kvtc_vllm.connector.mailbox import Mailbox
from kvtc_vllm.connector.messages import LoadItem, LoadJob
from kvtc_vllm.connector.names import Proof
from kvtc_vllm.connector.threads import thread_pool
from kvtc_vllm.connector.transfer import Transfer
from kvtc_vllm.tiers.memory import MemoryArena

logger = init_logger("vllm.kvtc")

CHANGED = "changed"
"""Reason of failure where what computes now is not what computed the chunk."""


@dataclass
class _Load:
    """A request's load. left: batches that no thread has ended yet. at_once: threads for it.

    proof: of what its chunks' names assume. same_adapter: whether its LoRA adapter was loaded with
    these contents. seconds: of all its batches, without the time that they waited for a thread.
    """

    request_id: str
    tokens: int
    left: int
    at_once: int
    proof: Proof
    same_adapter: bool
    point: Event
    failed: bool = False
    seconds: float = 0.0


class LoadPipeline:
    """The loads of one rank."""

    def __init__(
        self,
        config: KVTCConfig,
        geometry: CacheGeometry,
        transfer: Transfer,
        device: torch.device,
        arena: MemoryArena,
        mailbox: Mailbox,
    ) -> None:
        self.transfer = transfer
        self._geometry = geometry
        self._arena = arena
        self._mailbox = mailbox
        self._stream = SideStream(device)
        self._num_threads = config.load_threads
        self._threads = thread_pool("kvtc-load", config.load_threads, device)

    def begin(self, job: LoadJob, proof: Proof, same_adapter: bool) -> None:
        """Start a request's load. Engine's thread."""
        size = self.transfer.load_batch
        batches = [job.items[first : first + size] for first in range(0, len(job.items), size)]
        request = _Load(
            request_id=job.request_id,
            tokens=sum(self._tokens(item) for item in job.items),
            left=len(batches),
            at_once=min(len(batches), self._num_threads),
            proof=proof,
            same_adapter=same_adapter,
            point=Event(self._stream.device),
        )
        for batch in batches:
            self._threads.submit(self._load, batch, request)

    def check(self, proof: Proof) -> None:
        """Report if the weights are not those of the names."""
        self._threads.submit(self._holds, proof)

    def _holds(self, proof: Proof) -> bool:
        holds = proof.holds
        if not holds:
            self._mailbox.found_stale(proof.step, proof.epoch)
        return holds

    def shutdown(self) -> None:
        """Finish what runs, drop what waits."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _load(self, items: Sequence[LoadItem], request: _Load) -> None:
        """Fill the blocks of a batch of chunks; the last batch of a request ends its load.

        After a failure vLLM recomputes all that follows, so the rest isn't tried.
        """
        started = time.perf_counter()
        skipped = request.failed
        reasons: Sequence[str | None]
        reasons = [None] * len(items) if skipped else self._try(items, request)
        with self._mailbox.open() as mail:
            seconds = time.perf_counter() - started
            request.seconds += seconds
            mail.stats.add("decode_seconds", seconds)
            for item, reason in zip(items, reasons, strict=True):
                if skipped or reason is not None:
                    request.failed = True
                    mail.bad_blocks.update(item.block_ids)
                if reason is not None and reason != CHANGED:  # else another's chunk, but sound
                    mail.report.bad.append(item.key)
                    if reason != "missing":
                        # What is on disk is the same blob: offered again, it would fail again.
                        mail.report.disk_lost.append(item.key)
                if reason is not None:
                    mail.stats.add("failed_loads", label=reason)
            request.left -= 1
            if request.left:
                return
            mail.finished_loads.add(request.request_id)
            if not request.failed:
                mail.report.load_tokens += request.tokens
                mail.report.load_seconds += request.seconds / request.at_once
        self._mailbox.ring()

    def _try(self, items: Sequence[LoadItem], request: _Load) -> Sequence[str | None]:
        """For every chunk the reason why it failed, if it did. No exception gets past here."""
        if not self._holds(request.proof) or not request.same_adapter:
            return [CHANGED] * len(items)
        blobs = [self._arena.get(item.key) for item in items]
        found = [(item, blob) for item, blob in zip(items, blobs, strict=True) if blob is not None]
        try:
            with self._stream.after(request.point):
                errors = iter(self.transfer.load(found) if found else [])
            self._stream.synchronize()
        except Exception:
            logger.exception(
                "kvtc: loading %d chunks of request %s failed, recomputing",
                len(items),
                request.request_id,
            )
            return ["error"] * len(items)
        missing = ContainerError("missing", "the chunk is not in the tier")
        reasons: list[str | None] = []
        for item, blob in zip(items, blobs, strict=True):
            error = missing if blob is None else next(errors)
            reasons.append(None if error is None else error.reason)
            if error is None:
                self._count(item, blob)
            else:
                logger.warning(
                    "kvtc: chunk at token %d of request %s is unusable, recomputing: %s",
                    item.start,
                    request.request_id,
                    error,
                )
        return reasons

    def _count(self, item: LoadItem, blob: Blob | None) -> None:
        tokens = self._tokens(item)
        with self._mailbox.open() as mail:
            mail.stats.add("loaded_chunks")
            mail.stats.add("loaded_tokens", tokens)
            mail.stats.add("loaded_raw_bytes", tokens * self._geometry.token_bytes)
            mail.stats.add("loaded_bytes", len(blob or b""))

    def _tokens(self, item: LoadItem) -> int:
        return len(item.block_ids) * self._geometry.block_size
