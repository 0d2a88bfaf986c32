"""A recall on a stored prefix: everything is stored, each query reads some."""

from __future__ import annotations

from kvtc_vllm.evaluation.prefixes.base import Left, Prefix, PrefixMethod
from kvtc_vllm.evaluation.recall.base import Recall


class Recalled(PrefixMethod):
    """Layers are stored by the recall, each with what finds its tokens."""

    def __init__(self, recall: Recall) -> None:
        self._recall = recall

    def store(self, prefix: Prefix) -> Left:
        layers = []
        for number, layer in enumerate(prefix.cache.layers):
            attention = prefix.tally.attention(number)
            stored = self._recall.store(number, layer.keys[0], layer.values[0], attention)
            layer.keys, layer.values = stored.keys[None], stored.values[None]
            layers.append(stored)
        return Left(sum(stored.stored_bytes for stored in layers), layers)
