"""The reference way between the paged cache and blobs, through torch operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtc_vllm.codec.base import Blob, Coder, DecodedChunk, NewChunk, StoredChunk
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.streams import Event
from kvtc_vllm.offload.messages import LoadItem, StoreItem
from kvtc_vllm.offload.transfer import Staged
from kvtc_vllm.vllm_cache.layout import PagedLayout


@dataclass(frozen=True)
class _CopiedChunks:
    items: Sequence[StoreItem]
    tensors: list[torch.Tensor]


class TorchTransfer:
    """As many records per call as the codec likes, so that threads share those of a request."""

    def __init__(self, layout: PagedLayout, codec: Coder, chunk_tokens: int) -> None:
        self._layout = layout
        self.codec = codec
        self._chunk_tokens = chunk_tokens
        self.store_batch = self.load_batch = codec.batch

    def staged_bytes(self, blocks: int) -> int:
        return self._layout.staged_bytes(blocks)

    def stage(self, items: Sequence[StoreItem]) -> Staged:
        return _CopiedChunks(items, [self._layout.copy(item.block_ids) for item in items])

    def encode(self, staged: _CopiedChunks) -> list[bytes | CodecError]:
        return self.codec.encode_many(
            [
                NewChunk(*self._layout.unpack(pages), item.start, item.key)
                for item, pages in zip(staged.items, staged.tensors, strict=True)
            ]
        )

    def load(
        self, items: Sequence[tuple[LoadItem, Blob]], point: Event | None = None
    ) -> list[ContainerError | None]:
        chunks = self.codec.decode_many(
            [StoredChunk(blob, item.start, self._chunk_tokens, item.key) for item, blob in items]
        )
        if point is not None:
            point.wait()
        errors: list[ContainerError | None] = []
        for (item, _), chunk in zip(items, chunks, strict=True):
            if isinstance(chunk, ContainerError):
                errors.append(chunk)
            else:
                self._scatter(item, chunk)
                errors.append(None)
        return errors

    def _scatter(self, item: LoadItem, chunk: DecodedChunk) -> None:
        size = self._layout.block_size
        blocks = len(item.block_ids) // self._layout.tables
        wanted = slice(item.first_block * size, (item.first_block + blocks) * size)
        self._layout.scatter(item.block_ids, chunk.k[wanted], chunk.v[wanted])
