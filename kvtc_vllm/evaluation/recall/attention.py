"""Attention in transformers that reads what a recall chooses, and counts what it reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kvtc_vllm.evaluation.recall.base import STORED_BYTES, RecalledLayer

IMPLEMENTATION = "kvtc-recall"
"""Name of this attention in transformers."""


def install() -> None:
    """Make transformers know `IMPLEMENTATION`."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)


class Reads:
    """Counts what queries read of a recalled prefix. One query's bytes, on average."""

    def __init__(self, layers: Sequence[RecalledLayer]) -> None:
        self.layers = layers
        self._bytes = 0.0
        self._queries = 0

    def choose(self, number: int, queries: torch.Tensor) -> torch.Tensor | None:
        """What queries [Hq, T, D] of a layer read of its prefix: bool [Hq, T, C]; None is all."""
        layer = self.layers[number]
        count = queries.shape[1]
        self._bytes += layer.index_bytes * count
        self._queries += count if number == 0 else 0
        if layer.choose is None:
            return None
        chosen = layer.choose(queries)
        of_heads = chosen.unflatten(0, (len(layer.keys), -1)).any(dim=1)
        width = layer.keys.shape[-1] + layer.values.shape[-1]
        self._bytes += int(of_heads.sum()) * width * STORED_BYTES
        return chosen

    def bytes_per_query(self) -> int:
        """Of K and V of the prefix, all layers together; 0 before any query."""
        return round(self._bytes / self._queries) if self._queries else 0


@contextlib.contextmanager
def recalling(model: Any, reads: Reads | None) -> Iterator[None]:
    """While this lasts, queries read of the oldest cached tokens what `reads` chooses.

    model: a transformers decoder that uses `IMPLEMENTATION`. None: they read everything.
    """
    layers = [layer.self_attn for layer in model.base_model.layers]
    for layer in layers:
        layer.kvtc_reads = reads
    try:
        yield
    finally:
        for layer in layers:
            layer.kvtc_reads = None


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence without padding: query [1, Hq, T, D], key and value [1, H, K, D].

    The mask goes by the order in this layer's cache: layers may have different lengths, which a
    mask of transformers could not say.
    """
    keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ keys.mT * scaling
    queries, cached = scores.shape[-2:]
    later = torch.ones(queries, cached, dtype=torch.bool).triu(cached - queries + 1)
    scores = scores.masked_fill(later, float("-inf"))
    reads: Reads | None = getattr(module, "kvtc_reads", None)
    if reads is not None:
        chosen = reads.choose(module.layer_idx, query[0])
        if chosen is not None:
            prefix = scores[0, ..., : chosen.shape[-1]]
            prefix.masked_fill_(~chosen, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ values).transpose(1, 2).contiguous(), weights
