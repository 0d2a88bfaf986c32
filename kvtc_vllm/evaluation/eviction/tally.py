"""Attention that cached tokens receive, added up while a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from kvtc_vllm.evaluation.eviction.base import OBSERVED, Attention


class AttentionTally:
    """Sums of each layer, kept in step with one cache.

    Only sums and the newest queries are held, so that memory does not grow with the square of
    the context.
    """

    def __init__(self, kv_heads: int) -> None:
        self._kv_heads = kv_heads
        self._layers: dict[int, Attention] = {}

    @contextlib.contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Count what is run inside. model: a transformers decoder with eager attention."""
        handles = [
            layer.self_attn.register_forward_hook(partial(self._add, number))
            for number, layer in enumerate(model.base_model.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attention(self, layer: int) -> Attention:
        """What the cached tokens of a layer have received so far."""
        return self._layers[layer]

    def copy(self) -> AttentionTally:
        """Another one that starts from here."""
        other = AttentionTally(self._kv_heads)
        other._layers = dict(self._layers)
        return other

    def keep(self, layer: int, slots: torch.Tensor) -> None:
        """Forget evicted tokens. slots: [KV heads, kept] int64."""
        before = self._layers[layer]
        newest = before.newest
        # The newest query's attention is of use once only: the next query replaces it.
        self._layers[layer] = Attention(
            before.received.gather(1, slots),
            before.last[:, :0],
            newest.gather(2, slots[:, None].expand(-1, newest.shape[1], -1)),
        )

    def _add(self, layer: int, module: Any, arguments: Any, output: Any) -> None:
        weights = output[1][0]  # [query heads, queries, C]
        by_query_head = weights.sum(dim=1, dtype=torch.float64)
        received = by_query_head.unflatten(0, (self._kv_heads, -1)).sum(dim=1)
        grouped = weights[:, -OBSERVED:].unflatten(0, (self._kv_heads, -1))
        newest = grouped.sum(dim=1, dtype=torch.float64)
        if layer in self._layers:
            before = self._layers[layer]
            received[:, : before.received.shape[1]] += before.received
            earlier = before.newest[
                :, max(0, newest.shape[1] + before.newest.shape[1] - OBSERVED) :
            ]
            # Earlier queries have not seen the tokens that came since.
            wider = earlier.new_zeros(*earlier.shape[:2], newest.shape[2])
            wider[..., : earlier.shape[2]] = earlier
            newest = torch.cat((wider, newest), dim=1)
        # A copy, because a view would keep the whole map alive.
        self._layers[layer] = Attention(received, weights[:, -1].clone(), newest)
