"""Threads for calls that may never return.

A call to a dead disk cannot be cancelled. What can be done is not to wait for it: the
threads are daemons, a handle gives up at its deadline, and a pool whose threads all hang
says so instead of queueing more.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from kvtc_vllm.tiers.disk.checked import DiskError

T = TypeVar("T")


class IoHandle(Generic[T]):
    """The outcome of one call, now or later. Safe for any thread."""

    def __init__(
        self,
        call: Callable[[], T],
        deadline: float,
        refused: Callable[[DiskError], None] | None = None,
    ) -> None:
        self._call = call
        self._refused = refused
        self._deadline = deadline
        self._ended = threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None

    @property
    def expired(self) -> bool:
        """True once the deadline has passed, ended or not."""
        return time.monotonic() >= self._deadline

    @property
    def ready(self) -> bool:
        """True if `wait` would return or raise at once."""
        return self._ended.is_set() or self.expired

    def wait(self) -> T:
        """The call's result, or its exception.

        Raises DiskError "deadline" if it has not ended in time; a result that comes later
        is dropped, but what the call did to the disk stays done.
        """
        if not self._ended.wait(max(0.0, self._deadline - time.monotonic())):
            raise DiskError("deadline", "the disk did not answer in time")
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # None is then what the call returned

    def run(self) -> None:
        """Make the call and keep its outcome for `wait`. Never raises. On a pool's thread."""
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error
        self._ended.set()

    def refuse(self, error: DiskError) -> None:
        """Let `wait` raise `error`, without a call; tells whoever asked to be told."""
        self._error = error
        self._ended.set()
        if self._refused is not None:
            self._refused(error)


class IoPool:
    """A fixed number of threads and a bounded queue. Safe for any thread.

    threads: at least 1. queue_limit: calls that may wait for a thread.
    """

    def __init__(self, threads: int, queue_limit: int, name: str = "kvtc-disk") -> None:
        if threads < 1 or queue_limit < 0:
            raise ValueError(f"{threads} threads and a queue of {queue_limit} cannot be")
        self._queue_limit = queue_limit
        self._waiting: deque[IoHandle[Any]] = deque()
        self._running: set[IoHandle[Any]] = set()
        lock = threading.Lock()
        self._changed = threading.Condition(lock)  # for the threads
        self._idle = threading.Condition(lock)  # for `wait_idle`
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        call: Callable[[], T],
        seconds: float,
        refused: Callable[[DiskError], None] | None = None,
    ) -> IoHandle[T]:
        """Have `call` made by a thread; the handle gives up after `seconds` from now.

        Never blocks. Raises DiskError "stalled" if every thread hangs, "queue_full" or
        "closed". A call whose deadline passes while it waits is never made.
        refused: called with the reason, on any thread, when a call that was accepted will
        never be made.
        """
        handle = IoHandle(call, time.monotonic() + seconds, refused)
        expired: list[IoHandle[Any]] = []
        try:
            self._enqueue(handle, expired)
        finally:
            _refuse_expired(expired)
        return handle

    def _enqueue(self, handle: IoHandle[Any], expired: list[IoHandle[Any]]) -> None:
        """Put a call in the queue; those that make room for it are appended to `expired`."""
        with self._changed:
            if self._closed:
                raise DiskError("closed", "the pool was closed")
            if self._hung() == len(self._threads):
                raise DiskError("stalled", f"all {len(self._threads)} threads hang")
            idle = len(self._threads) - len(self._running)
            if len(self._waiting) >= self._queue_limit + idle:
                expired += [w for w in self._waiting if w.expired]
                self._waiting = deque(w for w in self._waiting if not w.expired)
                if len(self._waiting) >= self._queue_limit + idle:
                    raise DiskError("queue_full", f"{len(self._waiting)} calls are waiting")
            self._waiting.append(handle)
            self._changed.notify()

    @property
    def stalled(self) -> bool:
        """True while every thread is in a call past its deadline."""
        return self.hung == len(self._threads)

    @property
    def hung(self) -> int:
        """Threads in a call past its deadline."""
        with self._changed:
            return self._hung()

    @property
    def waiting(self) -> int:
        """Calls that no thread has taken yet."""
        with self._changed:
            return len(self._waiting)

    def wait_idle(self, seconds: float) -> bool:
        """Wait until no call waits or runs; False if `seconds` were not enough."""
        with self._idle:
            return self._idle.wait_for(
                lambda: not self._waiting and not self._running, max(0.0, seconds)
            )

    def close(self, seconds: float = 1.0) -> int:
        """Refuse what waits, give running calls `seconds` to end; returns how many did not."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for handle in waiting:
            handle.refuse(DiskError("closed", "the pool was closed"))
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)

    def _hung(self) -> int:
        return sum(handle.expired for handle in self._running)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                handle = self._waiting.popleft()
                expired = handle.expired  # nobody waits for it any more
                if not expired:
                    self._running.add(handle)
            if expired:
                _refuse_expired([handle])
            else:
                handle.run()
            with self._changed:
                self._running.discard(handle)
                self._idle.notify_all()


def _refuse_expired(handles: list[IoHandle[Any]]) -> None:
    for handle in handles:
        handle.refuse(DiskError("deadline", "no thread was free in time"))
