"""Memory tier -> paged cache, on threads of its own."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.streams import DeviceThreads, Event
from kvtc_vllm.offload.messages import LoadItem, LoadJob
from kvtc_vllm.offload.names import Proof
from kvtc_vllm.offload.outbox import News
from kvtc_vllm.offload.pace import Pace, PaceMeter
from kvtc_vllm.offload.rank_context import OUT_OF_MEMORY, RankContext, batches, failure_reason
from kvtc_vllm.offload.threads import on_every_thread, thread_pool
from kvtc_vllm.tiers.blob_store import StoreError
from kvtc_vllm.tiers.delta_store import LOST

logger = logging.getLogger("vllm.kvtc")

CHANGED = "changed"
"""Reason of failure where what computes now is not what computed the chunk."""
LATE = "late"
"""Reason where recomputing takes no longer than was waited already."""
_SOUND = (CHANGED, LATE, OUT_OF_MEMORY)
"""Reasons that say nothing against the chunk itself, which is kept."""
BLOCKS = "blocks"
"""Reason of failure where the engine's blocks are not those that the records fill."""


@dataclass
class _Load:
    """A request's load. Changed under the outbox's lock."""

    request_id: str
    waiting: deque[Sequence[LoadItem]]
    """Batches that no thread has begun."""
    tokens_each: float
    """Of a record, on the average over the cache groups."""
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
    running: int = 0
    """Batches that threads are at."""
    failed: bool = False
    given_up: bool = False
    """By order of the scheduler."""

    @property
    def is_late(self) -> bool:
        """Whether it is to end, or has taken longer than it may."""
        late = self.patience > 0 and time.monotonic() - self.began > self.patience
        return self.given_up or late


class LoadPipeline:
    """The loads of one rank."""

    def __init__(self, context: RankContext) -> None:
        self._transfers = context.transfers
        self._groups = context.geometry.groups
        self._memory = context.memory
        self._view = context.view
        self._outbox = context.outbox
        self._times_halved = context.times_halved
        self._device = context.device
        self._own = DeviceThreads(context.device)
        self._num_threads = context.config.load_threads
        self._running: dict[str, _Load] = {}
        self._meter = PaceMeter()
        self._threads = thread_pool("kvtc-load", self._num_threads, context.device)

    def begin(self, job: LoadJob, proof: Proof, same_adapter: bool) -> None:
        """Start a request's load. Engine's thread."""
        if not job.fits:
            self._refuse(job)
            return
        parts = deque(batches(job.items, self._batch_sizes(len(job.items))))
        tokens = sum(self._tokens(item) for item in job.items if item.group == 0)
        request = _Load(
            request_id=job.request_id,
            waiting=parts,
            tokens_each=tokens / max(1, len(job.items)),
            at_once=min(len(parts), self._num_threads),
            proof=proof,
            same_adapter=same_adapter,
            point=Event(self._device),
            began=time.monotonic(),
            patience=job.patience,
        )
        self._running[job.request_id] = request
        for _ in range(len(parts)):
            self._threads.submit(self._load, request)

    def give_up(self, request_ids: Sequence[str]) -> None:
        """End loads: no batch of them begins any more. Engine's thread."""
        with self._outbox.open() as out:
            for request_id in request_ids:
                request = self._running.get(request_id)
                if request is None:
                    continue
                request.given_up = True
                skipped = [item for batch in request.waiting for item in batch]
                request.waiting.clear()
                if skipped:
                    out.stats.add("failed_loads", len(skipped), LATE)
                    self._fail(out, request, skipped)
                self._end_if_done(out, request)
        self._outbox.notify()

    def take_pace(self) -> Pace:
        """How the threads loaded since the last call, in tokens."""
        return self._meter.take()

    def _batch_sizes(self, records: int) -> list[int]:
        """By cache group, so that no thread has an empty round where others have a batch."""
        sizes = []
        for transfer in self._transfers:
            parts = -(-records // transfer.load_batch)
            if parts > 1:
                parts += -parts % self._num_threads
            sizes.append(max(1, -(-records // max(1, parts))))
        return sizes

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

    def _load(self, request: _Load) -> None:
        """Fill the blocks of the next batch; the last batch of a request ends its load.

        After a failure vLLM recomputes all that follows, so the rest isn't tried.
        """
        with self._outbox.open() as out:
            if not request.waiting:
                return  # given up meanwhile
            items = request.waiting.popleft()
            if request.failed:
                self._fail(out, request, items)
                self._end_if_done(out, request)
                return
            request.running += 1
        started = time.perf_counter()
        with self._meter.piece(round(len(items) * request.tokens_each), request.at_once) as piece:
            reasons = self._try(items, request)
            piece.counts = not any(reasons)
        with self._outbox.open() as out:
            out.stats.add("decode_seconds", time.perf_counter() - started)
            for item, reason in zip(items, reasons, strict=True):
                if reason is None:
                    continue
                self._fail(out, request, [item])
                # A load of before a reset says nothing of what has the same key now.
                if reason not in _SOUND and request.proof.epoch == out.report.epoch:
                    out.report.bad.append(item.key)
                    if reason not in ("missing", LOST):
                        # What is on disk is the same blob: offered again, it would fail again.
                        out.report.disk_lost.append(item.key)
                out.stats.add("failed_loads", label=reason)
            request.running -= 1
            self._end_if_done(out, request)
        self._outbox.notify()

    def _fail(self, out: News, request: _Load, items: Sequence[LoadItem]) -> None:
        request.failed = True
        out.bad_blocks.update(block for item in items for block in item.block_ids)

    def _end_if_done(self, out: News, request: _Load) -> None:
        """Report the end once all batches have ended, and once only."""
        done = not request.waiting and not request.running
        if done and self._running.pop(request.request_id, None) is request:
            out.finished_loads.add(request.request_id)
            if request.failed:
                out.failed_loads.add(request.request_id)

    def _try(self, items: Sequence[LoadItem], request: _Load) -> Sequence[str | None]:
        """For every chunk the reason why it failed, if it did. No exception gets past here.

        A batch without an outcome would keep its request waiting for ever.
        """
        try:
            return self._outcomes(items, request)
        except Exception as failure:
            logger.exception(
                "kvtc: loading %d chunks of request %s failed, recomputing",
                len(items),
                request.request_id,
            )
            return [failure_reason(failure)] * len(items)

    def _outcomes(self, items: Sequence[LoadItem], request: _Load) -> Sequence[str | None]:
        if not self._holds(request.proof) or not request.same_adapter:
            return [CHANGED] * len(items)
        blobs: list[Blob | StoreError] = []
        for item in items:
            if request.is_late:  # a slow tier: nothing was written yet
                return [LATE] * len(items)
            blobs.append(self._read(item))
        found = [
            (item, blob)
            for item, blob in zip(items, blobs, strict=True)
            if not isinstance(blob, StoreError)
        ]
        transfer = self._transfers[items[0].group]
        # vLLM computes into the blocks of a failed load at once: nothing may write there then.
        with self._own.mine.stream.to_end():
            errors = iter(transfer.load(found, request.point) if found else [])
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

    def _read(self, item: LoadItem) -> Blob | StoreError:
        try:
            if self._view is None:
                return self._memory.read(item.key)
            if item.place is None:
                raise StoreError("missing", "the record is not in the first rank's memory")
            return self._view.read_at(item.place)
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
