"""Records between one cache group's pages and blobs: what the pipelines need of it.

There are two, both in `connector`. `TorchTransfer` takes any codec and any page layout, a record
at a time, through torch operations: the reference, and what runs on a CPU. `KernelTransfer` takes
whole batches through kernels: what runs on a GPU. Blobs of one are read by the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.streams import Event
from kvtc_vllm.offload.messages import LoadItem, StoreItem


class Staged(Protocol):
    """Records out of the paged cache, whose blocks may be overwritten."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the allocator must be told about when another stream encodes."""
        ...


class Transfer(Protocol):
    """store_batch, load_batch: most records to be staged and encoded, or loaded, in one call."""

    store_batch: int
    load_batch: int

    def staged_bytes(self, blocks: int) -> int:
        """Memory that `stage` takes for a record of so many blocks."""
        ...

    def stage(self, items: Sequence[StoreItem]) -> Staged:
        """Read records on the current stream, without waiting for it. On the engine's thread."""
        ...

    def encode(self, staged: Any) -> Sequence[Blob | CodecError]:
        """A blob for each record, or why there is none. On any thread; waits for the device."""
        ...

    def load(
        self, items: Sequence[tuple[LoadItem, Blob]], point: Event | None = None
    ) -> list[ContainerError | None]:
        """Verify and decode records into their blocks. On any thread; waits for the device.

        point: on another stream, before which the blocks may be in use; only the writing waits
        for it. Gives for every record None, or the error for which its blocks must be recomputed.
        What it raises it raises with work that may still run on the current stream.
        """
        ...
