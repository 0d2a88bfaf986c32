"""How many requests have contained a chunk, for as many chunks as memory allows."""

from __future__ import annotations

from kvtc_vllm.tiers.key_order import KeyOrder
from kvtc_vllm.tiers.keys import ChunkKey, RecordKey
from kvtc_vllm.tiers.sharded_dict import ShardedDict

REMEMBERED = 1 << 17
"""Keys counted at once, about 20 MiB; the least recently seen are forgotten first."""


class SeenCounter:
    """Counts how many requests contained each chunk. Used by one thread (the scheduler's).

    threshold: requests after which a chunk is admitted; 1 admits all and remembers nothing.
    """

    def __init__(self, threshold: int, remembered: int = REMEMBERED) -> None:
        self._threshold = threshold
        self._remembered = remembered
        self._counts: ShardedDict[int] = ShardedDict()
        self._order = KeyOrder()

    def admits(self, key: ChunkKey) -> bool:
        """Count one more request with this chunk; True once there were enough."""
        if self._threshold <= 1:
            return True
        # Kept when admitted, too: the chunk may be dropped or evicted and come back.
        count: int = min(self._counts.get(key, 0) + 1, self._threshold)
        self._counts[key] = count
        self._order.push(RecordKey(key))
        if len(self._order) > self._remembered:
            oldest = self._order.pop_oldest()
            assert oldest is not None
            del self._counts[oldest]
        return count >= self._threshold
