"""An L2 adapter around any other, through which blobs of varying size load back.

LMCache hands an adapter a buffer of the largest possible size and most of its adapters insist on
filling it, so what is smaller is stored and never loads. This one keeps the length beside each
blob (`kvtc_vllm.lmcache.records`), shrinks the buffer to it and verifies what came back, blob by
blob. What is damaged or foreign is deleted, so that the next store replaces it.

Nothing is atomic over two objects, and nothing needs to be: a blob without its record is not found,
and a record without its blob is deleted by the load that finds it so.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import KeyEntry, KeyListPage, MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2AdapterListener, L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier

from kvtc_vllm.config import ConfigError

# Importing serde registers it. LMCache builds a plugin adapter before the adapter's serde, so on
# the plain plugin route this import is what makes the serde known.
from kvtc_vllm.lmcache import serde as _registers_the_serde  # noqa: F401
from kvtc_vllm.lmcache.counters import Counters, logger
from kvtc_vllm.lmcache.inner import BlockingL2, build_inner
from kvtc_vllm.lmcache.records import original_key, record_key
from kvtc_vllm.lmcache.settings import load_settings
from kvtc_vllm.lmcache.sized_io import SizedIO
from kvtc_vllm.lmcache.transcoder import Refused, transcoder

R = TypeVar("R")

CLOSE_SECONDS = 10.0
"""How long closing waits for operations under way."""


class KvtcSizedL2Adapter(L2AdapterInterface):
    """LMCache's plugin adapter: params are {"inner": {...}, "kvtc": {...}, "io_workers": 2}.

    inner: configuration of the adapter that stores. kvtc: the serde's settings. io_workers:
    threads each for storing and for loading. Called on LMCache's store, prefetch and eviction
    threads; work is done on this adapter's own. Raises ConfigError or ArtifactError.
    """

    def __init__(self, params: dict[str, Any], l1_memory_desc: Any = None) -> None:
        super().__init__()
        missing = {"inner", "kvtc"} - set(params)
        unknown = set(params) - {"inner", "kvtc", "io_workers"}
        workers = params.get("io_workers", 2)
        if missing or unknown or not isinstance(workers, int) or not 1 <= workers <= 64:
            raise ConfigError(
                f"KVTC's L2 adapter is given {sorted(params)}; give inner, kvtc and, if wanted, "
                "io_workers from 1 to 64"
            )
        self._transcoder = transcoder(load_settings(params["kvtc"]))
        self._inner = build_inner(params["inner"], l1_memory_desc)
        self._blocking = BlockingL2(self._inner)
        self._io = SizedIO(
            self._blocking, self._inner.delete, self._inner.submit_unlock, self._transcoder
        )
        # One sequence for all: no number stands for tasks of two types.
        numbers = itertools.count(1)
        counters = self._transcoder.counters
        self._stores = _Tasks[L2StoreResult]("store", workers, numbers, counters)
        self._lookups = _Tasks[Bitmap]("lookup", 1, numbers, counters)
        self._loads = _Tasks[Bitmap]("load", workers, numbers, counters)

    # Event descriptors

    def get_store_event_fd(self) -> int:
        """Descriptor that becomes readable when a store task ends."""
        return self._stores.descriptor

    def get_lookup_and_lock_event_fd(self) -> int:
        """Descriptor that becomes readable when a lookup task ends."""
        return self._lookups.descriptor

    def get_load_event_fd(self) -> int:
        """Descriptor that becomes readable when a load task ends."""
        return self._loads.descriptor

    # Store

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Store blobs; empty ones are chunks that the serializer refused, and are left out."""

        def work() -> L2StoreResult:
            entries = [(k, o) for k, o in zip(keys, objects, strict=True) if o.get_size()]
            ours, records = self._records(key for key, _ in entries)
            stored = self._io.store(records, [entries[i][1] for i in ours]) if ours else 0
            return L2StoreResult(stored is not None, stored or 0)

        return self._stores.submit(work, failed=L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """Results of all store tasks that ended since the last call."""
        return self._stores.take_all()

    # Lookup

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """Find keys of which there is a record; those are locked."""

        def work() -> Bitmap:
            ours, records = self._records(keys)
            found = self._blocking.lookup_and_lock(records) if ours else []
            return _bitmap(len(keys), (i for i, has in zip(ours, found, strict=True) if has))

        return self._lookups.submit(work, failed=Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        """Result of a lookup, once; None if it has not ended."""
        return self._lookups.take(task_id)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Unlock what a lookup found."""
        self._inner.submit_unlock(self._records(keys)[1])

    # Load

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Load blobs into buffers of at least their size; each is narrowed to its blob."""

        def work() -> Bitmap:
            ours, records = self._records(keys)
            loaded = self._io.load(records, [(keys[i], objects[i]) for i in ours]) if ours else []
            return _bitmap(len(keys), (i for i, has in zip(ours, loaded, strict=True) if has))

        return self._loads.submit(work, failed=Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        """Result of a load, once; None if it has not ended."""
        return self._loads.take(task_id)

    # Deletion, listing, status

    def delete(self, keys: list[ObjectKey]) -> None:
        """Delete blobs and records; blocks."""
        self._io.delete_by_record(self._records(keys)[1])

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        """Keys of our blobs. A page may hold fewer than `page_size`, as records are left out."""
        page = self._inner.list_l2_keys(page_size=page_size, cursor=cursor)
        return KeyListPage(_own_entries(page.entries, model_name), page.next_page_token)

    def register_listener(self, listener: L2AdapterListener) -> None:
        """Tell `listener` of blobs under LMCache's own keys."""
        self._inner.register_listener(_OwnKeysListener(listener))

    def set_backend_identity(self, name: str, shared: bool = False) -> None:
        """Name the inner adapter, which publishes the events."""
        self._inner.set_backend_identity(name, shared)

    @property
    def inner_adapter(self) -> L2AdapterInterface:
        """The adapter that stores."""
        return self._inner

    @property
    def supports_global_eviction(self) -> bool:
        """Whether the inner adapter supports it."""
        return bool(self._inner.supports_global_eviction)

    def get_usage(self) -> AdapterUsage:
        """Real bytes: compressed blobs and records."""
        return self._inner.get_usage()

    def report_status(self) -> dict[str, Any]:
        """The inner adapter's status, and our counters."""
        return {**self._inner.report_status(), "kvtc": self._transcoder.counters.snapshot()}

    def close(self) -> None:
        """Let operations end, or give them up after CLOSE_SECONDS, then close the inner adapter."""
        self._blocking.give_up_after(CLOSE_SECONDS)
        every = (self._stores, self._lookups, self._loads)
        for tasks in every:
            tasks.stop()
        self._blocking.stop()
        self._inner.close()
        for tasks in every:
            tasks.close()

    def _records(self, keys: Iterable[ObjectKey]) -> tuple[list[int], list[ObjectKey]]:
        """Names of the records of those keys that are ours, and the keys' indices."""
        indices, records = [], []
        for index, key in enumerate(keys):
            try:
                records.append(record_key(key, self._transcoder.namespace(key)))
                indices.append(index)
            except Refused as error:
                self._transcoder.counters.warn(f"foreign_keys/{error.reason}", str(error))
        return indices, records


class _Tasks(Generic[R]):
    """Tasks of one type, done on threads of their own; an event tells when one ends. Thread-safe.

    numbers: of the tasks of all types.
    """

    def __init__(self, name: str, threads: int, numbers: Iterator[int], counters: Counters) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"kvtc-l2-{name}")
        self._event = create_event_notifier()
        self._numbers = numbers
        self._counters = counters
        self._lock = threading.Lock()
        self._results: dict[int, R] = {}

    @property
    def descriptor(self) -> int:
        """Descriptor of the event."""
        return int(self._event.fileno())

    def submit(self, work: Callable[[], R], failed: R) -> int:
        """Number of a new task. failed: its result if `work` raises."""
        task = next(self._numbers)

        def guarded() -> None:
            try:
                result = work()
            except Exception:
                # A task without a result would hang its caller: any error is a miss.
                self._counters.add("failed_tasks")
                logger.exception("kvtc: an L2 task failed")
                result = failed
            with self._lock:
                self._results[task] = result
            self._event.notify()

        self._pool.submit(guarded)
        return task

    def take(self, task: int) -> R | None:
        """Result of a task, once; None if it has not ended."""
        with self._lock:
            return self._results.pop(task, None)

    def take_all(self) -> dict[int, R]:
        """Results, by number, of the tasks that ended since the last call."""
        with self._lock:
            results, self._results = self._results, {}
        return results

    def stop(self) -> None:
        """Wait for running tasks, drop the others."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Close the event, after `stop`."""
        self._event.close()


def _bitmap(size: int, indices: Iterable[int]) -> Bitmap:
    bitmap = Bitmap(size)
    for index in indices:
        bitmap.set(index)
    return bitmap


def _own_entries(entries: Iterable[KeyEntry], model_name: str | None) -> tuple[KeyEntry, ...]:
    """Entries of blobs, renamed; all models if `model_name` is None."""
    renamed = ((original_key(entry.key), entry.size_bytes) for entry in entries)
    return tuple(
        KeyEntry(key, size)
        for key, size in renamed
        if key is not None and model_name in (None, key.model_name)
    )


class _OwnKeysListener(L2AdapterListener):
    """Passes on what concerns blobs; an eviction policy that saw records would evict them alone."""

    def __init__(self, listener: L2AdapterListener) -> None:
        self._listener = listener

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        """Report stored blobs. Called on the inner adapter's thread."""
        pairs = [(original_key(key), size) for key, size in zip(keys, sizes, strict=True)]
        kept = [(key, size) for key, size in pairs if key is not None]
        if kept:
            self._listener.on_l2_keys_stored([k for k, _ in kept], [s for _, s in kept])

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        """Report blobs that were read. Called on the inner adapter's thread."""
        if kept := _own_keys(keys):
            self._listener.on_l2_keys_accessed(kept)

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None:
        """Report deleted blobs. Called on the inner adapter's thread."""
        if kept := _own_keys(keys):
            self._listener.on_l2_keys_deleted(kept)


def _own_keys(keys: Iterable[ObjectKey]) -> list[ObjectKey]:
    return [key for key in map(original_key, keys) if key is not None]
