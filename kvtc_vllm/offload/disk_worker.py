"""Worker side of the disk tier: writes and reads of one rank, none of which blocks a step."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.offload.disk_asides import DiskAsides
from kvtc_vllm.offload.disk_losses import DiskLosses, reason_of
from kvtc_vllm.offload.disk_news import TOLD_AT_ONCE, DiskHalved, DiskNews, Found
from kvtc_vllm.offload.halver import Halver
from kvtc_vllm.offload.namespace import START_SECONDS, Namespace
from kvtc_vllm.offload.pace import Pace, PaceMeter
from kvtc_vllm.tiers.blob_store import Blob
from kvtc_vllm.tiers.disk import DiskError, IoHandle, IoPool, disk_bytes
from kvtc_vllm.tiers.inventory import Inventory
from kvtc_vllm.tiers.keys import RecordKey

logger = logging.getLogger("vllm.kvtc")

WRITE_SECONDS = 30.0
"""A write that has not begun by then is given up."""
QUEUE = 1 << 16
"""Calls that may wait for a thread; blobs that wait are bounded by their bytes."""
LOOK_SECONDS = 0.1
"""Between two looks at what others removed, while the engine makes steps: a `stat` if nothing."""
FIRST_LIST_SECONDS = 60.0
"""After the start, so that the engine has its requests first."""
LIST_SECONDS = 600.0
"""Between two lists of the files: what changed since the last is asked for at a start."""


class DiskWorker:
    """Owns a rank's part of the disk tier and its threads.

    Called by the engine's thread, `write` also by encoders; no call waits for the disk, but
    for `inventory` and `close`. Reads and writes have pools of their own: a write may wait
    for the root's lock. Looks and touches have `DiskAsides`. threads: of each pool.
    deadline_seconds: after which a read counts as failed. queue_bytes: of blobs that may wait to
    be written. ranks: that tell the scheduler their news in the same step.

    After a reset or a change of weights the chunks of before are left where they are and never
    read again: the engine goes on in another namespace.
    """

    def __init__(
        self,
        namespace: Namespace,
        threads: int,
        deadline_seconds: float,
        queue_bytes: int,
        ranks: int = 1,
    ) -> None:
        self._namespace: Namespace | None = namespace
        self._threads = threads
        self._deadline = deadline_seconds
        self._queue_bytes = queue_bytes
        self._readers = IoPool(threads, QUEUE, "kvtc-disk-read")
        self._writers = IoPool(threads, QUEUE, "kvtc-disk-write")
        self._asides = DiskAsides(self._touch, self._look_now, self._count)
        self._reads: list[tuple[RecordKey, IoHandle[bytes]]] = []
        self._meter = PaceMeter()
        self._tenant_of: Callable[[RecordKey], bytes] = _nobody
        # What follows is read and changed under the lock.
        self._lock = threading.Lock()
        self._news = DiskNews()
        self._told_at_once = max(1, TOLD_AT_ONCE // ranks)
        self._found = Found()
        self._losses = DiskLosses()
        self._epoch = 0
        self._writing: dict[tuple[int, RecordKey], int] = {}
        self._queued = 0
        self._repairs = 0
        self._next_look = 0.0
        self._next_list = time.monotonic() + FIRST_LIST_SECONDS

    def share_bodies(self, tenant_of: Callable[[RecordKey], bytes]) -> None:
        """From now on, keep equal bodies of what `write` and `close` are given once, by tenant.

        tenant_of: of a record that is given; it is called on the threads that call them.
        """
        self._tenant_of = tenant_of

    def inventory(self) -> Inventory:
        """(key, bytes) of what is on disk, least recently used first; clears leftovers.

        Called once, before the first step. Nothing if the disk fails: that is no reason not
        to serve.
        """
        namespace = self._namespace
        assert namespace is not None
        until = time.monotonic() + START_SECONDS
        try:
            return self._readers.submit(partial(namespace.listed, until), START_SECONDS).wait()
        except Exception as error:
            logger.warning("kvtc: what is on disk can't be listed, starting empty: %s", error)
            self._count(error)
            return Inventory()

    def write(self, key: RecordKey, blob: Blob, epoch: int) -> None:
        """Write when a thread is free; dropped and counted if too much waits.

        epoch: in which the blob was made; one of another is dropped.
        """
        size = len(blob)
        with self._lock:
            namespace = self._namespace
            if epoch != self._epoch or namespace is None or (epoch, key) in self._writing:
                return
            if self._queued + size > self._queue_bytes:
                self._news.errors["queue_full"] += 1
                return
            self._writing[epoch, key] = size
            self._queued += size
        tenant = self._tenant_of(key)  # now: memory may be about to forget it
        self._submit_write(
            partial(self._write, namespace, key, blob, epoch, tenant),
            lambda: self._end_write(key, epoch),
        )

    def read(self, keys: Sequence[RecordKey]) -> None:
        """Begin to read chunks; `take_news` tells the outcome."""
        namespace, losses = self._namespace, self._losses
        for key in keys:
            try:
                if namespace is None:
                    raise DiskError("closed", "no namespace is open since the last reset")
                read = partial(self._read, namespace, losses, key)
                handle = self._readers.submit(read, self._deadline)
            except DiskError as error:
                self._fail(key, error)
            else:
                self._reads.append((key, handle))

    def halve(self, keys: Sequence[RecordKey], halver: Halver) -> None:
        """Halve chunks when a thread is free; `take_news` tells what became of each."""
        namespace, epoch = self._namespace, self._epoch
        for key in keys:
            if namespace is not None:
                self._submit_write(
                    partial(self._halve, namespace, key, halver, epoch),
                    partial(self._note_halved, DiskHalved(key, halver.most_times, True), epoch),
                )

    def remove(self, keys: Sequence[RecordKey]) -> None:
        """Delete chunks when a thread is free."""
        if keys and self._namespace is not None:
            self._submit_write(partial(self._namespace.remove, keys))

    def touch(self, keys: Sequence[RecordKey]) -> None:
        """Mark records as used, the last one most recently."""
        if keys and self._namespace is not None:
            self._asides.touch(self._namespace, keys)

    def leave(self, epoch: int) -> None:
        """Forget what was begun before `epoch`; nothing is read or written until `enter`."""
        self._reads.clear()
        with self._lock:
            left, self._namespace = self._namespace, None
            self._epoch = epoch
            self._news = DiskNews(errors=self._news.errors)
            self._found, self._losses = Found(), DiskLosses()
            self._repairs = 0
        if left is not None:
            self._submit_write(left.leave)

    def enter(self, namespace: Namespace) -> None:
        """Go on in another namespace; what it holds already is told as found."""
        with self._lock:
            self._namespace = namespace
            epoch = self._epoch
        with suppress(DiskError):  # not listed: found again when it is stored again
            self._readers.submit(partial(self._list, namespace, epoch), START_SECONDS)

    def take_news(self) -> DiskNews:
        """Outcomes since the last call."""
        self._look()
        running = []
        stalled = bool(self._reads) and self._readers.stalled
        for key, handle in self._reads:
            if not handle.ready:
                if stalled:  # asked before the threads were known to hang
                    self._fail(key, DiskError("stalled", "all threads hang"))
                else:
                    running.append((key, handle))
                continue
            try:
                blob = handle.wait()
            except Exception as error:
                self._fail(key, error)
            else:
                with self._lock:
                    self._news.read.append((key, blob))
        self._reads = running
        with self._lock:
            news, self._news = self._news, DiskNews()
            self._losses.tell(news, self._told_at_once)
            self._found.tell(news, self._told_at_once)
        return news

    def close(self, last: Iterable[tuple[RecordKey, Blob]], seconds: float) -> None:
        """Write what waits and then `last`, for at most `seconds`, and stop."""
        until = time.monotonic() + seconds
        namespace = self._namespace
        # Nobody could find there what is written now.
        source = iter(last if namespace is not None and not namespace.own else ())
        lock = threading.Lock()
        with suppress(DiskError):
            if namespace is not None:
                for _ in range(self._threads):
                    drain = partial(self._drain, namespace, source, lock, until)
                    self._writers.submit(drain, seconds)
            if self._writers.wait_idle(seconds) and namespace is not None:
                self._asides.wait_idle((until - time.monotonic()) / 2)
                with suppress(DiskError):
                    listing = partial(namespace.keep_list, (time.monotonic() + until) / 2)
                    self._writers.submit(listing, until - time.monotonic()).wait()
                # By a thread of the pool as well: even closing may hang on a dead disk.
                self._writers.submit(namespace.leave, until - time.monotonic()).wait()
        self._readers.close(0.0)
        self._writers.close(0.0)
        self._asides.close()

    def take_pace(self) -> Pace:
        """How the threads read since the last call, in records."""
        return self._meter.take()

    # ------------------------------------------------------- on the pools' threads

    def _read(self, namespace: Namespace, losses: DiskLosses, key: RecordKey) -> bytes:
        with losses.reading(key), self._meter.piece(1, self._threads) as piece:
            blob = namespace.read(key)
            piece.counts = True
        return blob

    def _write(
        self, namespace: Namespace, key: RecordKey, blob: Blob, epoch: int, tenant: bytes
    ) -> None:
        """A write that is overtaken by a reset is still right under its own name."""
        try:
            if epoch != self._epoch:
                return
            with self._losses.writing(key):
                size = namespace.store.write(key, blob, tenant)
            saved = disk_bytes(len(blob)) - size
            with self._lock:
                if epoch == self._epoch:
                    self._news.stored.append((key, size))
                    self._news.written_bytes += min(len(blob), size)
                    self._news.shared_chunks += saved > 0
                    self._news.shared_bytes += saved
        except Exception as error:
            if epoch == self._epoch:
                self._count(error)
        finally:
            self._note_removed(namespace, epoch)
            self._end_write(key, epoch)

    def _halve(self, namespace: Namespace, key: RecordKey, halver: Halver, epoch: int) -> None:
        """What can't be halved is as if it had been, as often as can be.

        The smaller blob takes the other's place; a process that is killed in between loses the
        chunk.
        """
        done = DiskHalved(key, halver.most_times, True)
        try:
            if epoch != self._epoch:
                return
            blob = namespace.read(key)
            new = halver.halve(blob, key)
            if len(new) < len(blob):
                with self._losses.writing(key):
                    size, times = namespace.store.write(key, new), halver.times_halved(new)
                done = DiskHalved(key, times, times >= halver.most_times, size)
        except Exception as error:
            with self._lock:
                damaged = isinstance(error, DiskError | ContainerError) and epoch == self._epoch
                if damaged:
                    self._losses.add((key,))
            if damaged or not isinstance(error, CodecError):
                self._count(error)
        finally:
            self._note_removed(namespace, epoch)
            self._note_halved(done, epoch)

    def _note_halved(self, done: DiskHalved, epoch: int) -> None:
        with self._lock:
            if epoch == self._epoch:
                self._news.halved.append(done)

    def _drain(
        self,
        namespace: Namespace,
        source: Iterator[tuple[RecordKey, Blob]],
        lock: threading.Lock,
        until: float,
    ) -> None:
        while time.monotonic() < until:
            with lock:
                item = next(source, None)
            if item is None:
                return
            self._write(namespace, *item, self._epoch, self._tenant_of(item[0]))

    def _list(self, namespace: Namespace, epoch: int) -> None:
        try:
            found = namespace.listed(time.monotonic() + START_SECONDS)
        except Exception as error:
            self._count(error)
            return
        with self._lock:
            if epoch == self._epoch:
                self._found = Found(found)

    def _touch(self, namespace: Namespace, keys: Sequence[RecordKey]) -> None:
        losses = self._losses
        if namespace is self._namespace:  # then these are its losses
            with losses.looking() as gone:
                gone += namespace.store.touch(keys)

    def _note_removed(self, namespace: Namespace, epoch: int) -> None:
        """Take over what left the disk, whoever removed it, and what was repaired."""
        losses = self._losses
        if epoch != self._epoch:
            return
        with suppress(DiskError):
            store = namespace.store
            with losses.looking() as gone:
                gone += store.take_removed()
                gone += store.take_evicted()
            repairs = store.counts().get("repairs", 0)
            with self._lock:
                if epoch == self._epoch:
                    self._news.repairs += repairs - self._repairs
                    self._repairs = repairs

    def _look_now(self) -> None:
        with self._lock:
            namespace, epoch = self._namespace, self._epoch
        if namespace is not None:
            self._note_removed(namespace, epoch)

    # -------------------------------------------------------------- on any thread

    def _look(self) -> None:
        """Have it found out now and then what other processes removed."""
        namespace, now = self._namespace, time.monotonic()
        if namespace is not None and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._asides.look()
        if namespace is not None and now >= self._next_list:
            self._next_list = now + LIST_SECONDS
            self._submit_write(partial(namespace.keep_list, now + LIST_SECONDS))

    def _end_write(self, key: RecordKey, epoch: int) -> None:
        with self._lock:
            self._queued -= self._writing.pop((epoch, key), 0)

    def _submit_write(
        self, call: Callable[[], None], refused: Callable[[], None] = lambda: None
    ) -> None:
        """refused: called instead, if no thread takes the call in time."""

        def counted() -> None:
            try:
                call()
            except Exception as error:
                self._count(error)

        def give_up(error: DiskError) -> None:
            self._count(error)
            refused()

        try:
            self._writers.submit(counted, WRITE_SECONDS, give_up)
        except DiskError as error:
            give_up(error)

    def _fail(self, key: RecordKey, error: Exception) -> None:
        with self._lock:
            self._news.failed.append(key)
        self._count(error)

    def _count(self, error: Exception) -> None:
        """Whatever the exception is: one that a store does not declare is counted and logged."""
        with self._lock:
            self._news.errors[reason_of(error)] += 1
        if not isinstance(error, DiskError):
            logger.error("kvtc: the disk tier failed", exc_info=error)


def _nobody(key: RecordKey) -> bytes:
    return b""
