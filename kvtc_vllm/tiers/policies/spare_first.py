"""Another policy, but records that are also elsewhere go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

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

    def spare(self, prefix: Iterable[RecordKey]) -> None:
        """Count resident records as spare, given first record first; the last goes first."""
        for key in reversed(list(prefix)):
            self._spare[key] = None
            self._spare.move_to_end(key)

    def keep(self, keys: Iterable[RecordKey]) -> None:
        """Count records as spare no more, and as the most recent, the last one most."""
        for key in keys:
            self._spare.pop(key, None)
            self._inner.refresh(key)

    def insert(self, key: RecordKey, size: int) -> None:
        self._inner.insert(key, size)

    def hit(self, key: RecordKey) -> None:
        self._spare.pop(key, None)
        self._inner.hit(key)

    def refresh(self, key: RecordKey) -> None:
        self._inner.refresh(key)  # its request has ended, and it is still in the engine's cache

    def remove(self, key: RecordKey) -> None:
        self._spare.pop(key, None)
        self._inner.remove(key)

    def evict(self, evictable: Callable[[RecordKey], bool]) -> RecordKey | None:
        victim = next((key for key in self._spare if evictable(key)), None)
        if victim is not None:
            self.remove(victim)
            return victim
        victim = self._inner.evict(evictable)
        if victim is not None:
            self._spare.pop(victim, None)
        return victim

    def clear(self) -> None:
        self._spare.clear()
        self._inner.clear()
