"""What a method leaves of a stored prefix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtc_vllm.evaluation.eviction.tally import AttentionTally
from kvtc_vllm.evaluation.recall.base import RecalledLayer

MASK_BITS_PER_BYTE = 8


@dataclass
class Prefix:
    """One sequence's cached tokens. cache: a DynamicCache. tally: of the same tokens.

    seen: tokens of the text so far. positions: int64, of the cached tokens where all layers have
    the same ones.
    """

    cache: Any
    tally: AttentionTally
    seen: int
    positions: torch.Tensor


@dataclass(frozen=True)
class Left:
    """stored_bytes: of the prefix. recalled: where each query reads some of it, its layers."""

    stored_bytes: int
    recalled: Sequence[RecalledLayer] | None = None


class PrefixMethod(ABC):
    """Does to a prefix what storing and loading it would do. No state of its own."""

    @abstractmethod
    def store(self, prefix: Prefix) -> Left:
        """Change cache, tally and positions in place. prefix: of at least one token."""


def mask_bytes(seen: int, sets: int) -> int:
    """A bit per token seen and set of tokens that is chosen by itself."""
    return sets * -(-seen // MASK_BITS_PER_BYTE)


def take(cached: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """cached: [1, KV heads, C, D]. slots: [KV heads, kept] -> [1, KV heads, kept, D]."""
    return cached.gather(2, slots[None, :, :, None].expand(-1, -1, -1, cached.shape[-1]))
