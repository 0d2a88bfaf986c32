"""An eviction on a stored prefix: each layer keeps the tokens that it chooses."""

from __future__ import annotations

from kvtc_vllm.evaluation.eviction.base import Eviction
from kvtc_vllm.evaluation.prefixes.base import Left, Prefix, PrefixMethod, mask_bytes, take
from kvtc_vllm.evaluation.recall.base import cache_bytes


class Evicted(PrefixMethod):
    """Stored are K and V of the tokens that stay, and one bit for each token of the prefix and
    each set of tokens that is chosen by itself (H2O: KV head, TOVA: layer).

    K and V are charged as bfloat16 without being rounded to it, which can only favour eviction.
    """

    def __init__(self, eviction: Eviction) -> None:
        self._eviction = eviction

    def store(self, prefix: Prefix) -> Left:
        sets = size = 0
        for number, layer in enumerate(prefix.cache.layers):
            heads, cached = layer.keys.shape[1:3]
            budget = min(self._eviction.budget(prefix.seen), cached)
            chosen = self._eviction.select(prefix.tally.attention(number), budget)
            sets += len(chosen)
            slots = chosen.expand(heads, -1)
            prefix.tally.keep(number, slots)
            layer.keys, layer.values = take(layer.keys, slots), take(layer.values, slots)
            size += cache_bytes(layer.keys, layer.values)
        return Left(size + mask_bytes(prefix.seen, sets))
