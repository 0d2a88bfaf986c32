"""Memory tier -> paged cache, on threads of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.streams import DeviceThreads, Event
from kvtc_vllm.offload.messages import LoadItem, LoadJob
from kvtc_vllm.offload.names import Proof
from kvtc_vllm.offload.rank_context import RankContext, batches
from kvtc_vllm.offload.threads import on_every_thread, thread_pool
from kvtc_vllm.tiers.blob_store import StoreError
from kvtc_vllm.tiers.delta_store import LOST
from kvtc_vllm.tiers.keys import RecordKey

logger = logging.getLogger("vllm.kvtc")

CHANGED = "changed"
"""Reason of failure where what computes now is not what computed the chunk."""
LATE = "late"
"""Reason where recomputing takes no longer than was waited already."""
OUT_OF_MEMORY = "out_of_memory"
_SOUND = (CHANGED, LATE, OUT_OF_MEMORY)
"""Reasons that say nothing against the chunk itself, which is kept."""
BLOCKS = "blocks"
"""Reason of failure where the engine's blocks are not those that the records fill."""


@dataclass
class _Load:
    """A request's load."""

    request_id: str
    tokens: int
    left: int
    """Batches that no thread has ended yet."""
    at_once: int
    """Threads that work for it at most."""
    proof: Proof
    """Of what its records' names assume."""
    same_adapter: bool
    """Whether its LoRA adapter is loaded with the contents that the names assume."""
    point: Event
    """On the engine's stream, before which its blocks may still be in use. Only the writing into
    them waits for it."""
    began: float
    """On the monotonic clock."""
    patience: float
    """Seconds from then after which it is given up; 0 for no limit."""
    failed: bool = False
    gave_up: bool = False
    """Because it was late."""
    seconds: float = 0.0
    """Of all its batches, without the time that they waited for a thread."""

    @property
    def is_late(self) -> bool:
        """Whether it has taken longer than it may."""
        return self.patience > 0 and time.monotonic() - self.began > self.patience


class LoadPipeline:
    """The loads of one rank."""

    def __init__(self, context: RankContext) -> None:
        self._transfers = context.transfers
        self._groups = context.geometry.groups
        self._memory = context.memory
        self._outbox = context.outbox
        self._times_halved = context.times_halved
        self._device = context.device
        self._own = DeviceThreads(context.device)
        self._num_threads = context.config.load_threads
        self._threads = thread_pool("kvtc-load", self._num_threads, context.device)

    def begin(self, job: LoadJob, proof: Proof, same_adapter: bool) -> None:
        """Start a request's load. Engine's thread."""
        if not job.fits:
            self._refuse(job)
            return
        parts = list(batches(job.items, [transfer.load_batch for transfer in self._transfers]))
        request = _Load(
            request_id=job.request_id,
            tokens=sum(self._tokens(item) for item in job.items if item.group == 0),
            left=len(parts),
            at_once=min(len(parts), self._num_threads),
            proof=proof,
            same_adapter=same_adapter,
            point=Event(self._device),
            began=time.monotonic(),
            patience=job.patience,
        )
        for batch in parts:
            self._threads.submit(self._load, batch, request)

    def _refuse(self, job: LoadJob) -> None:
        logger.warning(
            "kvtc: request %s was given other blocks than its chunks fill, recomputing; please "
            "report this vLLM version",
            job.request_id,
        )
        with self._outbox.open() as out:
            out.stats.add("failed_loads", label=BLOCKS)
            out.bad_blocks.update(block for item in job.items for block in item.block_ids)
            out.failed_loads.add(job.request_id)
            out.finished_loads.add(job.request_id)
        self._outbox.notify()

    def warm_up(self, found: Sequence[tuple[LoadItem, Blob]]) -> None:
        """Load records of one cache group on every thread."""
        if not found:
            return
        transfer = self._transfers[found[0][0].group]
        point = Event(self._device)

        def load() -> None:
            with self._own.mine.stream.to_end():
                transfer.load(found, point)

        on_every_thread(self._threads, self._num_threads, load)

    def check(self, proof: Proof, holds: Callable[[Proof], None] = lambda proof: None) -> None:
        """Report if the weights are not those of the names, else call `holds` on a thread."""
        self._threads.submit(self._check, proof, holds)

    def _check(self, proof: Proof, holds: Callable[[Proof], None]) -> None:
        if self._holds(proof):
            holds(proof)

    def _holds(self, proof: Proof) -> bool:
        holds = proof.holds
        if not holds:
            self._outbox.found_stale(proof.step, proof.epoch)
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
        with self._outbox.open() as out:
            seconds = time.perf_counter() - started
            request.seconds += seconds
            out.stats.add("decode_seconds", seconds)
            for item, reason in zip(items, reasons, strict=True):
                if skipped or reason is not None:
                    request.failed = True
                    out.bad_blocks.update(item.block_ids)
                if reason is not None and reason not in _SOUND:
                    out.report.bad.append(item.key)
                    if reason not in ("missing", LOST):
                        # What is on disk is the same blob: offered again, it would fail again.
                        out.report.disk_lost.append(item.key)
                if reason is not None:
                    out.stats.add("failed_loads", label=reason)
            request.left -= 1
            if request.left:
                return
            out.finished_loads.add(request.request_id)
            if request.failed:
                out.failed_loads.add(request.request_id)
            else:
                out.report.load_tokens += request.tokens
                out.report.load_seconds += request.seconds / request.at_once
            if request.gave_up:
                # Else a rate that got worse would never be noticed.
                out.report.load_tokens += request.tokens
                out.report.load_seconds += time.monotonic() - request.began
        self._outbox.notify()

    def _try(self, items: Sequence[LoadItem], request: _Load) -> Sequence[str | None]:
        """For every chunk the reason why it failed, if it did. No exception gets past here."""
        if request.is_late:
            request.gave_up = True
            return [LATE] * len(items)
        if not self._holds(request.proof) or not request.same_adapter:
            return [CHANGED] * len(items)
        blobs = [self._read(item.key) for item in items]
        found = [
            (item, blob)
            for item, blob in zip(items, blobs, strict=True)
            if not isinstance(blob, StoreError)
        ]
        transfer = self._transfers[items[0].group]
        try:
            # vLLM computes into the blocks of a failed load at once: nothing may write there then.
            with self._own.mine.stream.to_end():
                errors = iter(transfer.load(found, request.point) if found else [])
        except Exception as failure:
            logger.exception(
                "kvtc: loading %d chunks of request %s failed, recomputing",
                len(items),
                request.request_id,
            )
            memory = isinstance(failure, torch.OutOfMemoryError)
            return [OUT_OF_MEMORY if memory else "error"] * len(items)
        reasons: list[str | None] = []
        for item, blob in zip(items, blobs, strict=True):
            error = blob if isinstance(blob, StoreError) else next(errors)
            reasons.append(None if error is None else error.reason)
            if not isinstance(blob, StoreError) and error is None:
                self._count(item, blob)
            else:
                logger.warning(
                    "kvtc: chunk at token %d of request %s is unusable, recomputing: %s",
                    item.start,
                    request.request_id,
                    error,
                )
        return reasons

    def _read(self, key: RecordKey) -> Blob | StoreError:
        try:
            return self._memory.read(key)
        except StoreError as error:
            return error

    def _count(self, item: LoadItem, blob: Blob) -> None:
        tokens, group, size = self._tokens(item), self._groups[item.group], len(blob)
        with self._outbox.open() as out:
            out.stats.add("loaded_chunks")
            out.stats.add("kind_loaded_chunks", label=group.kind)
            # Once per token, whatever the number of groups that it has KV in.
            out.stats.add("loaded_tokens", tokens if item.group == 0 else 0)
            out.stats.add("loaded_raw_bytes", group.raw_bytes(item.block_ids))
            out.stats.add("loaded_bytes", size)
            if self._times_halved is not None:
                out.stats.add("halved_loaded_chunks", label=str(self._times_halved(blob)))
            out.stats.add("kind_loaded_bytes", size, group.kind)

    def _tokens(self, item: LoadItem) -> int:
        return self._groups[item.group].tokens(item.block_ids)
