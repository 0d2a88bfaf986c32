"""An eviction under KVTC: one set of tokens for the whole model, and what stays in coded chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.transform import keys_from_rows, rows_from_keys
from kvtc_vllm.evaluation.eviction.base import Eviction, pooled
from kvtc_vllm.evaluation.prefixes.base import Left, Prefix, PrefixMethod, mask_bytes, take


class Coded(PrefixMethod):
    """A chunk holds rows of all layers and heads of the same tokens, so these keep the same ones:
    the eviction chooses once, by attention summed over all layers and heads.

    Of what stays, `chunk_tokens` consecutive tokens at a time are a chunk, at positions without
    gaps: keys are turned to them before they are encoded, and back after they are decoded.
    Stored are the blobs, and a bit per token of the prefix. KV is rounded to bfloat16 before and
    after, as in a cache. In a chat, what stays is coded again in every turn.
    """

    def __init__(
        self,
        eviction: Eviction,
        codec: ChunkCodec,
        ropes: Sequence[Rope | None],
        chunk_tokens: int,
    ) -> None:
        """codec: for bfloat16. ropes: one per layer."""
        self._eviction = eviction
        self._codec = codec
        self._ropes = ropes
        self._chunk_tokens = chunk_tokens

    def store(self, prefix: Prefix) -> Left:
        layers = prefix.cache.layers
        cached = layers[0].keys.shape[2]
        attention = pooled([prefix.tally.attention(number) for number in range(len(layers))])
        budget = min(self._eviction.budget(prefix.seen), cached)
        (slots,) = self._eviction.select(attention, budget)
        prefix.positions = prefix.positions[slots]
        for number, layer in enumerate(layers):
            own = slots.expand(layer.keys.shape[1], -1)
            prefix.tally.keep(number, own)
            layer.keys, layer.values = take(layer.keys, own), take(layer.values, own)
        k, v = (_rows(layers, name) for name in ("keys", "values"))
        size, k, v = self._round_trip(k, v, prefix.positions)
        for number, layer in enumerate(layers):
            layer.keys, layer.values = (
                x[:, number].transpose(0, 1)[None].to(layer.keys.dtype) for x in (k, v)
            )
        return Left(size + mask_bytes(prefix.seen, 1))

    def _round_trip(
        self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor
    ) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Bytes of all blobs, and K and V after them: [T, L, H, D]."""
        places = torch.arange(len(k))
        k, v = self._moved(k.bfloat16(), positions, places), v.bfloat16()
        size = 0
        decoded = []
        for start in range(0, len(k), self._chunk_tokens):
            part = slice(start, start + self._chunk_tokens)
            blob = self._codec.encode(k[part], v[part], start)
            size += len(blob)
            decoded.append(self._codec.decode(blob, start, len(k[part])))
        keys = torch.cat([chunk.k for chunk in decoded])
        return size, self._moved(keys, places, positions), torch.cat([c.v for c in decoded])

    def _moved(self, keys: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Keys [T, L, H, D] of tokens at some positions as if they were at others, bfloat16."""
        if torch.equal(before, after):
            return keys
        rows = rows_from_keys(keys, self._ropes, before)
        return keys_from_rows(rows, self._ropes, after, keys.shape[2]).bfloat16()


def _rows(layers: Any, name: str) -> torch.Tensor:
    """[T, L, H, D] of a DynamicCache's layers."""
    return torch.stack([getattr(layer, name)[0].transpose(0, 1) for layer in layers], dim=1)
