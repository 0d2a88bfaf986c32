"""The GPU's way between the paged cache and blobs. Importing it needs Triton."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.kernels.paged_codec import PagedCodec
from kvtc_vllm.codec.kernels.paged_raw import PagedRawCodec
from kvtc_vllm.codec.streams import Event
from kvtc_vllm.offload.messages import LoadItem, StoreItem
from kvtc_vllm.offload.transfer import Staged


class KernelTransfer:
    """All chunks of a step, or of a request, in one batch.

    Every thread that encodes or loads takes a workspace of its own.
    """

    store_batch = sys.maxsize
    load_batch = sys.maxsize

    def __init__(self, codec: PagedCodec | PagedRawCodec, chunk_tokens: int) -> None:
        self.codec = codec
        self._chunk_tokens = chunk_tokens

    def staged_bytes(self, blocks: int) -> int:
        return self.codec.staging_bytes(blocks * self.codec.block_size)

    def stage(self, items: Sequence[StoreItem]) -> Staged:
        return self.codec.stage(items)

    def encode(self, staged: Any) -> Sequence[Blob | CodecError]:
        return self.codec.encode_staged(staged)

    def load(
        self, items: Sequence[tuple[LoadItem, Blob]], point: Event | None = None
    ) -> list[ContainerError | None]:
        return self.codec.load(items, self._chunk_tokens, point)
