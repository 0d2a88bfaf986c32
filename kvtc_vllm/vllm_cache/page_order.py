"""The order of elements in a head's page of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from kvtc_vllm.codec.kernels.paged import PagedCache, PagedTensor


class PageOrder(Protocol):
    """Converts pages [n, H, N, D + Dv] to and from K [n, H, N, D], V [n, H, N, Dv]."""

    def split(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def join(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor: ...

    def sides(self, tensors: Sequence[torch.Tensor]) -> PagedCache:
        """Views of K and V. Raises UnsupportedError if strides can't express the order."""
        ...


class PackedOrder:
    """K in the first head_size elements of the last dimension, V in the rest."""

    def __init__(self, head_size: int) -> None:
        self._head_size = head_size

    def split(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pages[..., : self._head_size], pages[..., self._head_size :]

    def join(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat((k, v), dim=-1)

    def sides(self, tensors: Sequence[torch.Tensor]) -> PagedCache:
        return PagedCache.packed(tensors, self._head_size)


class LatentOrder:
    """V in the first elements of the last dimension, K in the rest."""

    def __init__(self, head_size_v: int) -> None:
        self._head_size_v = head_size_v

    def split(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pages[..., self._head_size_v :], pages[..., : self._head_size_v]

    def join(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat((v, k), dim=-1)

    def sides(self, tensors: Sequence[torch.Tensor]) -> PagedCache:
        keys, values = zip(*map(self.split, tensors), strict=True)
        return PagedCache(PagedTensor.of(keys), PagedTensor.of(values))
