"""The adapter that the sized one stores in: made from its JSON, used by blocking calls."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import consume_fd

from kvtc_vllm.config import ConfigError
from kvtc_vllm.lmcache.command import OUTER_KEYS
from kvtc_vllm.lmcache.counters import logger

PROVEN = ("fs", "fs_native", "mock", "resp", "s3")
"""Adapters with which this one is tested."""
REFUSED = {
    **dict.fromkeys(
        ("nixl_store", "nixl_store_dynamic", "nixl_native", "p2p", "dax"),
        "it moves whole buffers registered with its device",
    ),
    "plugin": "adapters of others are not wrapped",
}
_POLL_MS = 200
Result = TypeVar("Result")
Batch = tuple[list[ObjectKey], list[MemoryObj]]


def build_inner(values: dict[str, Any], l1_memory_desc: Any) -> L2AdapterInterface:
    """Make the inner adapter from its JSON. Raises ConfigError."""
    name = values.get("type")
    if name in REFUSED:
        raise ConfigError(f"KVTC does not store in {name!r}: {REFUSED[name]}")
    if values.get("use_odirect"):
        raise ConfigError("use_odirect does not fit KVTC, whose blobs are of any length")
    outer = [key for key in (*OUTER_KEYS, "serde") if key in values]
    if outer:
        raise ConfigError(f"{outer} belong beside the inner adapter, not into it")
    if name not in PROVEN:
        logger.warning("kvtc: storing in %r has not been tested; tested are %s", name, PROVEN)
    try:
        config = get_l2_adapter_config_class(name).from_dict(dict(values))
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"inner L2 adapter {name!r}: {error}") from error
    return create_l2_adapter(config, l1_memory_desc)


class Abandoned(Exception):
    """The adapter is being closed and this operation has not ended in time."""


class BlockingL2:
    """Calls one adapter and waits; any number of threads may call at once.

    One thread waits on the adapter's three event descriptors and wakes the callers.
    """

    def __init__(self, inner: L2AdapterInterface) -> None:
        self._inner = inner
        self._woken = threading.Condition()
        self._stores: dict[int, L2StoreResult] = {}
        self._give_up_at: float | None = None
        # An abandoned operation may still read or write its buffers until the adapter is closed.
        self._abandoned: list[Sequence[MemoryObj]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="kvtc-l2-events")
        self._thread.start()

    def store(self, batches: Sequence[Batch]) -> list[bool]:
        """Store batches; one result per batch. Raises Abandoned."""
        done = self._run(self._inner.submit_store_task, self._stored, batches)
        return [result is not None and result.is_successful() for result in done]

    def load(self, batches: Sequence[Batch]) -> list[list[bool]]:
        """Load batches; one result per object. Raises Abandoned."""
        done = self._run(self._inner.submit_load_task, self._inner.query_load_result, batches)
        return [
            [found is not None and bool(found.test(i)) for i in range(len(objs))]
            for found, (_, objs) in zip(done, batches, strict=True)
        ]

    def lookup_and_lock(self, keys: list[ObjectKey]) -> list[bool]:
        """Which objects there are; those are locked. Raises Abandoned."""
        task = self._inner.submit_lookup_and_lock_task(keys, {})
        found = self._wait(partial(self._inner.query_lookup_and_lock_result, task), [])
        return [bool(found.test(i)) for i in range(len(keys))]

    def give_up_after(self, seconds: float) -> None:
        """From then on every waiting call raises Abandoned."""
        with self._woken:
            self._give_up_at = time.monotonic() + seconds
            self._woken.notify_all()

    def stop(self) -> None:
        """End the listening thread, before the adapter closes its descriptors."""
        self._stopping.set()
        self._thread.join()

    def _run(
        self,
        submit: Callable[[list[ObjectKey], list[MemoryObj]], int],
        query: Callable[[int], Result | None],
        batches: Sequence[Batch],
    ) -> list[Result | None]:
        """Submit all batches, then wait for each. None for a batch that was not taken."""
        tasks: list[int | None] = []
        for keys, objs in batches:
            try:
                tasks.append(submit(keys, objs))
            except Exception as error:
                # Whatever an adapter raises here means the same: this batch is not done.
                logger.warning("kvtc: the storage took no batch of %d: %r", len(keys), error)
                tasks.append(None)
        return [
            None if task is None else self._wait(partial(query, task), objs)
            for task, (_, objs) in zip(tasks, batches, strict=True)
        ]

    def _stored(self, task: int) -> L2StoreResult | None:
        """Called with the lock held: tasks are popped all together, whoever they belong to."""
        self._stores.update(self._inner.pop_completed_store_tasks())
        return self._stores.pop(task, None)

    def _wait(self, query: Callable[[], Result | None], objs: Sequence[MemoryObj]) -> Result:
        while True:
            with self._woken:
                # Asked while holding the lock that the listener needs: no wake-up can be missed.
                result = query()
                if result is not None:
                    return result
                if self._give_up_at is not None and time.monotonic() >= self._give_up_at:
                    self._abandoned.append(objs)
                    raise Abandoned("the storage did not answer before the adapter was closed")
                self._woken.wait(_POLL_MS / 1e3)

    def _listen(self) -> None:
        poller = select.poll()
        for descriptor in (
            self._inner.get_store_event_fd(),
            self._inner.get_lookup_and_lock_event_fd(),
            self._inner.get_load_event_fd(),
        ):
            poller.register(descriptor, select.POLLIN)
        while not self._stopping.is_set():
            for descriptor, _ in poller.poll(_POLL_MS):
                try:
                    consume_fd(descriptor)
                except OSError as error:
                    logger.debug("kvtc: event descriptor %d: %s", descriptor, error)
            with self._woken:
                self._woken.notify_all()
