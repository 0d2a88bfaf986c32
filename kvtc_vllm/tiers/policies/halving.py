"""Another policy, and an order in which records are made smaller before any is evicted."""

from __future__ import annotations

from kvtc_vllm.tiers.key_order import KeyOrder
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.policies.base import EvictionPolicy


class HalvingOrder:
    """Around the policy that a configuration asks for.

    Records are told apart by how many times they were halved. Of those that were halved equally
    often, the ones with the most bytes together, a record counting half of one that was halved once
    less, give up the one that was used longest ago; until it is those that can't be halved again:
    then records are to be evicted. So all come to have equal shares of memory, and what was used
    last stays whole.
    """

    def __init__(self, inner: EvictionPolicy) -> None:
        self.name = inner.name
        self._inner = inner
        self._orders: list[KeyOrder] = []
        self._halving: set[RecordKey] = set()
        self._held: dict[RecordKey, int] = {}
        self._last: int | None = None
        self.clear()

    def take_coldest(self) -> RecordKey | None:
        """The record to halve next; it is not named again before `halved`. None: there is none."""
        times = max(range(len(self._orders)), key=lambda n: len(self._orders[n]) / 2**n)
        if times == self._last:
            return None
        key = self._orders[times].pop_oldest()
        if key is not None:
            self._halving.add(key)
        return key

    def halved(self, key: RecordKey, times: int, last: bool) -> None:
        """Note how often a record was halved by now. last: whether it can't be again."""
        if last:
            self._last = times
        if key not in self._halving:
            return  # evicted meanwhile
        self._halving.discard(key)
        while len(self._orders) <= times:
            self._orders.append(KeyOrder())
        if key in self._held:
            self._held[key] = times
        else:
            self._orders[times].push(key)

    def insert(self, key: RecordKey, size: int) -> None:
        self._forget(key)
        self._orders[0].push(key)
        self._inner.insert(key, size)

    def hit(self, key: RecordKey) -> None:
        self._renew(key)
        self._inner.hit(key)

    def refresh(self, key: RecordKey) -> None:
        self._renew(key)
        self._inner.refresh(key)

    def hold(self, key: RecordKey) -> None:
        # It is about to be loaded, so it is not cold.
        for times, order in enumerate(self._orders):
            if order.discard(key):
                self._held[key] = times
        if key in self._halving:
            self._held[key] = 0  # `halved` will tell
        self._inner.hold(key)

    def release(self, key: RecordKey) -> None:
        times = self._held.pop(key, None)
        if times is not None and key not in self._halving:
            self._orders[times].push(key)
        self._inner.release(key)

    def remove(self, key: RecordKey) -> None:
        self._forget(key)
        self._inner.remove(key)

    def evict(self) -> RecordKey | None:
        victim = self._inner.evict()
        if victim is not None:
            self._forget(victim)
        return victim

    def clear(self) -> None:
        self._orders = [KeyOrder()]
        self._halving.clear()
        self._held.clear()
        self._inner.clear()

    def _renew(self, key: RecordKey) -> None:
        for order in self._orders:
            if key in order:
                order.push(key)

    def _forget(self, key: RecordKey) -> None:
        self._halving.discard(key)
        self._held.pop(key, None)
        for order in self._orders:
            order.discard(key)
