"""How many requests have contained a chunk, for as many chunks as memory allows."""

from __future__ import annotations

from collections import OrderedDict

from kvtc_vllm.tiers.keys import ChunkKey

REMEMBERED = 1 << 17
"""Keys counted at once, about 20 MiB; the least recently seen are forgotten first."""


class SeenCounter:
    """Counts how many requests contained each chunk. Used by one thread (the scheduler's).

    threshold: requests after which a chunk is admitted; 1 admits all and remembers nothing.
    """

    def __init__(self, threshold: int, remembered: int = REMEMBERED) -> None:
        self._threshold = threshold
        self._remembered = remembered
        self._counts: OrderedDict[ChunkKey, int] = OrderedDict()

    def admits(self, key: ChunkKey) -> bool:
        """Count one more request with this chunk; True once there were enough."""
        if self._threshold <= 1:
            return True
        # Kept when admitted, too: the chunk may be dropped or evicted and come back.
        count = min(self._counts.pop(key, 0) + 1, self._threshold)
        self._counts[key] = count
        if len(self._counts) > self._remembered:
            self._counts.popitem(last=False)
        return count >= self._threshold
