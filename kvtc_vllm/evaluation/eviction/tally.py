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
        # [KV heads, newest queries, C] float64 of each layer, of which `observed` is the sum.
        self._newest: dict[int, torch.Tensor] = {}

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

    def keep(self, layer: int, slots: torch.Tensor) -> None:
        """Forget evicted tokens. slots: [KV heads, kept] int64."""
        received = self._layers[layer].received.gather(1, slots)
        rows = self._newest[layer]
        rows = rows.gather(2, slots[:, None].expand(-1, rows.shape[1], -1))
        self._newest[layer] = rows
        # The newest query's attention is of use once only: the next query replaces it.
        last = self._layers[layer].last[:, :0]
        self._layers[layer] = Attention(received, last, rows.sum(dim=1))

    def _add(self, layer: int, module: Any, arguments: Any, output: Any) -> None:
        weights = output[1][0]  # [query heads, queries, C]
        by_query_head = weights.sum(dim=1, dtype=torch.float64)
        received = by_query_head.unflatten(0, (self._kv_heads, -1)).sum(dim=1)
        if layer in self._layers:
            before = self._layers[layer].received
            received[:, : before.shape[1]] += before
        newest = weights[:, -OBSERVED:].unflatten(0, (self._kv_heads, -1))
        rows = newest.sum(dim=1, dtype=torch.float64)
        if layer in self._newest:
            before = self._newest[layer]
            before = before[:, max(0, rows.shape[1] + before.shape[1] - OBSERVED) :]
            # Earlier queries have not seen the tokens that came since.
            wider = before.new_zeros(*before.shape[:2], rows.shape[2])
            wider[..., : before.shape[2]] = before
            rows = torch.cat((wider, rows), dim=1)
        self._newest[layer] = rows
        # A copy, because a view would keep the whole map alive.
        self._layers[layer] = Attention(received, weights[:, -1].clone(), rows.sum(dim=1))
