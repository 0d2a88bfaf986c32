"""What the pipelines of one worker share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch

from kvtc_vllm.codec.base import Blob
from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.disk_worker import DiskWorker
from kvtc_vllm.offload.geometry import CacheGeometry
from kvtc_vllm.offload.messages import LoadItem, StoreItem
from kvtc_vllm.offload.outbox import Outbox
from kvtc_vllm.offload.transfer import Transfer
from kvtc_vllm.offload.unsettled import Unsettled
from kvtc_vllm.tiers.blob_store import BlobStore
from kvtc_vllm.tiers.shared_arena import SharedView

Item = TypeVar("Item", StoreItem, LoadItem)

OUT_OF_MEMORY = "out_of_memory"
"""Reason of failure that says nothing against the chunk."""


@dataclass(frozen=True)
class RankContext:
    """One rank's caches, tiers and threads' common outbox."""

    config: KVTCConfig
    geometry: CacheGeometry
    transfers: Sequence[Transfer]
    """By cache group."""
    device: torch.device
    """Where the paged cache is."""
    staging_capacity: int
    """Bytes that records may take between staging and encoding."""
    rank: int
    """This worker's number among the engine's workers, 0-based."""
    memory: BlobStore
    disk: DiskWorker | None
    """This rank's part of the disk tier, if there is one."""
    outbox: Outbox
    unsettled: Unsettled
    """What this rank has stored and others may not have."""
    times_halved: Callable[[Blob], int] | None = None
    """How often a blob of memory was halved; None where none ever is."""
    one_copy: bool = False
    """The first rank keeps what all have the same, for all."""
    view: SharedView | None = None
    """What the first rank keeps, as another one reads it; such a rank keeps nothing."""

    @property
    def keepers(self) -> int:
        """Ranks that keep something."""
        return 1 if self.one_copy else self.geometry.ranks


def batches(items: Sequence[Item], sizes: Sequence[int]) -> Iterator[Sequence[Item]]:
    """Neighbouring items of one cache group. sizes: most items of a batch, by cache group."""
    for group, neighbours in groupby(items, key=lambda item: item.group):
        same = list(neighbours)
        for first in range(0, len(same), sizes[group]):
            yield same[first : first + sizes[group]]


def failure_reason(error: Exception) -> str:
    """The label under which a store or a load that raised is counted."""
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return OUT_OF_MEMORY if memory else "error"
