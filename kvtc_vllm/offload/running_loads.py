"""Loads that run: what they pin, and who should wait for them instead of loading the same.

vLLM shares the blocks of a load once it has ended and its request was looked at again. A second
request of the same prefix that loads at once would decode the same chunks into blocks of its
own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtc_vllm.offload.vllm_types import Request
from kvtc_vllm.tiers.keys import RecordKey

_LOADING = "WAITING_FOR_REMOTE_KVS"
"""vLLM's status of a request whose load runs, or has ended and was not looked at yet."""


class RunningLoads:
    """Used by the scheduler's thread only."""

    def __init__(self) -> None:
        self._pinned: dict[str, list[RecordKey]] = {}
        self._keys: dict[str, Sequence[RecordKey]] = {}
        self._loader: dict[RecordKey, Request] = {}
        self._waits: dict[str, Request] = {}

    def begin(self, request: Request, keys: Sequence[RecordKey], pinned: list[RecordKey]) -> None:
        """Take note of a planned load. pinned: records to unpin at its end."""
        self._pinned[request.request_id] = pinned
        self._keys[request.request_id] = keys
        for key in keys:
            self._loader[key] = request

    def is_running(self, request_id: str) -> bool:
        """Whether workers have not reported the end of the request's load."""
        return request_id in self._pinned

    def end(self, request_id: str) -> list[RecordKey]:
        """Drop a load that workers have ended, well or not; returns what it pinned."""
        return self._pinned.pop(request_id, [])

    def forget(self, request: Request) -> None:
        """Have nobody wait for a request that ended."""
        self._waits.pop(request.request_id, None)
        for key in self._keys.pop(request.request_id, ()):
            if self._loader.get(key) is request:
                del self._loader[key]

    def forget_names(self) -> None:
        """Unpin and wait for nothing of the names before, which may come back meanwhile."""
        self._pinned = {request_id: [] for request_id in self._pinned}
        self._keys.clear()
        self._loader.clear()
        self._waits.clear()

    def should_wait(self, request: Request, keys: Iterable[RecordKey]) -> bool:
        """Whether another request is loading one of these chunks into blocks that it can share."""
        for key in keys:
            loader = self._loader.get(key)
            if loader is None or loader is request:
                continue
            if self._is_loading(loader):
                self._waits[request.request_id] = loader
                return True
            del self._loader[key]
        self._waits.pop(request.request_id, None)
        return False

    def is_waiting(self, request_id: str) -> bool:
        """True while the load that a request was told to wait for runs. Takes constant time."""
        loader = self._waits.get(request_id)
        if loader is None or loader.request_id not in self._keys:
            return False  # it waits for nobody, or for a request that ended meanwhile
        return self._is_loading(loader)

    def _is_loading(self, loader: Request) -> bool:
        status = getattr(getattr(loader, "status", None), "name", "")
        return loader.request_id in self._pinned or status == _LOADING

    def __bool__(self) -> bool:
        return bool(self._pinned)
