"""Another policy, but records that are also elsewhere go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.policies.base import EvictionPolicy


class SpareFirst:
    """Around the policy that a configuration asks for.

    A record is *spare* as long as the engine's own cache holds the same: losing it costs nothing
    until then.
    """

    def __init__(self, inner: EvictionPolicy) -> None:
        self.name = inner.name
        self._inner = inner
        self._spare: OrderedDict[RecordKey, None] = OrderedDict()
        self._held: dict[RecordKey, bool] = {}  # whether it is spare when it is released

    def spare(self, prefix: Iterable[RecordKey]) -> None:
        """Count resident records as spare, given first record first; the last goes first."""
        for key in reversed(list(prefix)):
            self._add(key)

    def keep(self, keys: Iterable[RecordKey]) -> None:
        """Count records as spare no more, and as the most recent, the last one most."""
        for key in keys:
            self._drop(key)
            self._inner.refresh(key)

    def insert(self, key: RecordKey, size: int) -> None:
        self._inner.insert(key, size)

    def hit(self, key: RecordKey) -> None:
        self._drop(key)
        self._inner.hit(key)

    def refresh(self, key: RecordKey) -> None:
        self._inner.refresh(key)  # its request has ended, and it is still in the engine's cache

    def hold(self, key: RecordKey) -> None:
        was_spare = key in self._spare
        self._spare.pop(key, None)
        self._held[key] = was_spare
        self._inner.hold(key)

    def release(self, key: RecordKey) -> None:
        self._inner.release(key)
        if self._held.pop(key, False):
            self._add(key)

    def remove(self, key: RecordKey) -> None:
        self._spare.pop(key, None)
        self._held.pop(key, None)
        self._inner.remove(key)

    def evict(self) -> RecordKey | None:
        if not self._spare:
            return self._inner.evict()
        victim, _ = self._spare.popitem(last=False)
        self._inner.remove(victim)
        return victim

    def clear(self) -> None:
        self._spare.clear()
        self._held.clear()
        self._inner.clear()

    def _add(self, key: RecordKey) -> None:
        if key in self._held:
            self._held[key] = True
            return
        self._spare[key] = None
        self._spare.move_to_end(key)

    def _drop(self, key: RecordKey) -> None:
        self._spare.pop(key, None)
        if key in self._held:
            self._held[key] = False
