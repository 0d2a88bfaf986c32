"""The reference way between the paged cache and blobs, through torch operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtc_vllm.codec.base import Blob, Coder
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.connector.layout import PagedLayout
from kvtc_vllm.offload.messages import LoadItem, StoreItem
from kvtc_vllm.offload.transfer import Staged


@dataclass(frozen=True)
class _CopiedChunks:
    items: Sequence[StoreItem]
    tensors: list[torch.Tensor]


class TorchTransfer:
    """One record per call, so that several threads share the chunks of a request."""

    store_batch = 1
    load_batch = 1

    def __init__(self, layout: PagedLayout, codec: Coder, chunk_tokens: int) -> None:
        self._layout = layout
        self.codec = codec
        self._chunk_tokens = chunk_tokens

    def staged_bytes(self, blocks: int) -> int:
        return blocks * self._layout.block_bytes

    def stage(self, items: Sequence[StoreItem]) -> Staged:
        return _CopiedChunks(items, [self._layout.copy(item.block_ids) for item in items])

    def encode(self, staged: _CopiedChunks) -> list[bytes | CodecError]:
        return [
            self._encode(item, pages)
            for item, pages in zip(staged.items, staged.tensors, strict=True)
        ]

    def load(self, items: Sequence[tuple[LoadItem, Blob]]) -> list[ContainerError | None]:
        return [self._load(item, blob) for item, blob in items]

    def _encode(self, item: StoreItem, pages: torch.Tensor) -> bytes | CodecError:
        try:
            return self.codec.encode(*self._layout.unpack(pages), item.start, item.key)
        except CodecError as error:
            return error

    def _load(self, item: LoadItem, blob: Blob) -> ContainerError | None:
        try:
            chunk = self.codec.decode(
                blob, expect_start=item.start, expect_tokens=self._chunk_tokens, key=item.key
            )
        except ContainerError as error:
            return error
        size = self._layout.block_size
        wanted = slice(item.first_block * size, (item.first_block + len(item.block_ids)) * size)
        self._layout.scatter(item.block_ids, chunk.k[wanted], chunk.v[wanted])
        return None
