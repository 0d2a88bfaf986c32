"""What a worker asks of its disk beside reads and writes: uses of chunks, looks at what is gone.

Neither takes the root's lock. They have a thread of their own, so that they don't wait behind
writes, of which there may be thousands: chunks in use would be evicted meanwhile, and what others
evicted be promised to requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import islice

from kvtc_vllm.offload.namespace import Namespace
from kvtc_vllm.tiers.disk import DiskError, IoPool
from kvtc_vllm.tiers.keys import RecordKey

ASIDE_SECONDS = 30.0
"""A call that has not begun by then is given up."""
TOUCHED_AT_ONCE = 4096
"""Keys of a call: looks take turns with these."""


class DiskAsides:
    """A thread and what waits for it: one look at most, and each key once. Safe for any thread.

    touch, look: called on that thread. failed: called on any with what they raised, or with the
    reason why keys are not touched. A look that can't be made is made up for by the next.
    """

    def __init__(
        self,
        touch: Callable[[Namespace, Sequence[RecordKey]], None],
        look: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._pool = IoPool(1, 2, "kvtc-disk-aside")
        self._touch_now = touch
        self._failed = failed
        self._touches = _OneCall(self._pool, self._touch_some, self._drop_touches)
        self._looks = _OneCall(self._pool, look, self._look_failed)
        self._lock = threading.Lock()
        self._namespace: Namespace | None = None
        self._keys: dict[RecordKey, None] = {}
        """To be touched in that namespace, the last one last."""

    def touch(self, namespace: Namespace, keys: Sequence[RecordKey]) -> None:
        """Mark records as used, the last one most recently. Those of another namespace that still
        wait are dropped."""
        with self._lock:
            if namespace is not self._namespace:
                self._namespace, self._keys = namespace, {}
            for key in keys:
                self._keys.pop(key, None)
                self._keys[key] = None
        self._touches.ask()

    def look(self) -> None:
        """Have a look begun after this call."""
        self._looks.ask()

    def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing waits or runs; False if `seconds` were not enough."""
        return self._pool.wait_idle(seconds)

    def close(self) -> None:
        """Refuse what waits, and wait for nothing."""
        self._pool.close(0.0)

    def _touch_some(self) -> None:
        with self._lock:
            namespace = self._namespace
            keys = list(islice(self._keys, TOUCHED_AT_ONCE))
            for key in keys:
                del self._keys[key]
            more = bool(self._keys)
        if more:
            self._touches.ask()
        if keys and namespace is not None:
            self._touch_now(namespace, keys)

    def _drop_touches(self, error: Exception) -> None:
        with self._lock:
            self._keys = {}
        self._failed(error)

    def _look_failed(self, error: Exception) -> None:
        if not isinstance(error, DiskError):
            self._failed(error)


class _OneCall:
    """A call of which one waits at most: it serves all who ask before it begins."""

    def __init__(
        self, pool: IoPool, call: Callable[[], None], failed: Callable[[Exception], None]
    ) -> None:
        self._pool = pool
        self._call = call
        self._failed = failed
        self._lock = threading.Lock()
        self._waiting = False

    def ask(self) -> None:
        """Never blocks, never raises."""
        with self._lock:
            if self._waiting:
                return
            self._waiting = True
        try:
            self._pool.submit(self._run, ASIDE_SECONDS, self._refuse)
        except DiskError as error:
            self._refuse(error)

    def _run(self) -> None:
        with self._lock:
            self._waiting = False
        try:
            self._call()
        except Exception as error:
            self._failed(error)

    def _refuse(self, error: DiskError) -> None:
        with self._lock:
            self._waiting = False
        self._failed(error)
