"""What a recall method implements: one layer's K and V -> what of them each query reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvtc_vllm.evaluation.eviction.base import Attention
from kvtc_vllm.evaluation.settings import Budgeted

STORED_BYTES = 2
"""Of a key or value element, as in a bfloat16 cache."""

Choose = Callable[[torch.Tensor], torch.Tensor]
"""Queries with RoPE [query heads, T, D] -> tokens that each reads, bool [query heads, T, C]."""


@dataclass(frozen=True)
class RecalledLayer:
    """A stored layer of C tokens. keys, values: [KV heads, C, D], as they are read back.

    stored_bytes: of all of it, with what finds tokens. index_bytes: what every query reads
    whatever it chooses. choose: None if every query reads all, which index_bytes then counts.
    """

    keys: torch.Tensor
    values: torch.Tensor
    stored_bytes: int
    index_bytes: int
    choose: Choose | None = None


def cache_bytes(*tensors: torch.Tensor) -> int:
    """K and V as they are stored where nothing is done to them."""
    return sum(tensor.numel() for tensor in tensors) * STORED_BYTES


class Recall(Budgeted, ABC):
    """Keeps all tokens, and lets queries read some. Listed in
    `kvtc_vllm.evaluation.recall.RECALLS`.
    """

    @abstractmethod
    def store(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, attention: Attention
    ) -> RecalledLayer:
        """layer: its number. keys, values: [KV heads, C, D] post-RoPE, compute dtype.

        attention: what the tokens received while the prefix was computed.
        """
