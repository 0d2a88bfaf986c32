"""States of recurrent layers (Mamba, gated delta nets, short convolutions) <-> blobs, bit for bit.

vLLM gives every layer of such a group one page per block: all of its states back to back, as
bytes. A record is the pages of one boundary. The raw codec keeps them as a chunk of one token,
whose keys and values are the bytes of the page; nothing computes with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.base import Blob, NewChunk, StoredChunk
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.streams import Event
from kvtc_vllm.connector.compat import UnsupportedError
from kvtc_vllm.offload.geometry import CacheGroup
from kvtc_vllm.offload.messages import LoadItem, StoreItem
from kvtc_vllm.offload.transfer import Staged

STATE_ELEMENT = torch.bfloat16
"""What the codec takes two bytes for."""
HEAD_SIZE = 128
"""Elements of K and of V per head of such a chunk; pages are filled up to whole heads."""
_HEAD_BYTES = 2 * HEAD_SIZE * STATE_ELEMENT.itemsize


def state_geometry(group: CacheGroup) -> Geometry:
    """The codec's view of a page: so many heads of a token."""
    layers = len(group.layer_names)
    heads = -(-group.state_bytes // _HEAD_BYTES)
    return Geometry(layers, heads, HEAD_SIZE, HEAD_SIZE, ((0, layers),))


class StateTransfer:
    """A `Transfer`, a record at a time.

    caches: layer name -> registered tensor, bytes [blocks, ..., C], C those of a layer's states.
    Raises UnsupportedError for other tensors.
    """

    store_batch = load_batch = 1

    def __init__(self, caches: dict[str, torch.Tensor], group: CacheGroup) -> None:
        missing = [name for name in group.layer_names if name not in caches]
        if missing:
            raise UnsupportedError(f"layers {missing[:3]} have states, but no KV cache")
        self._group = group
        self._pages: list[torch.Tensor] = []
        for name in group.layer_names:
            tensor = caches[name]
            if tensor[0].numel() * tensor.element_size() != group.state_bytes:
                raise UnsupportedError(
                    f"layer {name}: a page {tuple(tensor.shape)} {tensor.dtype} does not hold the "
                    f"{group.state_bytes} bytes of its states"
                )
            self._pages.append(tensor)
        self._tables = [group.tables.index(table) for table in group.layer_table]
        self._tables = self._tables or [0] * len(self._pages)
        self.codec = open_codec("raw", STATE_ELEMENT, geometry=state_geometry(group))

    def staged_bytes(self, blocks: int) -> int:
        return blocks // len(self._group.tables) * self.codec.geometry.token_elements() * 2

    def stage(self, items: Sequence[StoreItem]) -> Staged:
        return _CopiedStates(items, [self._copy(item.block_ids) for item in items])

    def encode(self, staged: _CopiedStates) -> list[bytes | CodecError]:
        geometry = self.codec.geometry
        shape = (1, geometry.num_layers, geometry.num_kv_heads, 2 * HEAD_SIZE)
        chunks = []
        for item, pages in zip(staged.items, staged.tensors, strict=True):
            k, v = pages.view(STATE_ELEMENT).view(shape).split(HEAD_SIZE, dim=-1)
            chunks.append(NewChunk(k, v, item.start, item.key))
        return self.codec.encode_many(chunks)

    def load(
        self, items: Sequence[tuple[LoadItem, Blob]], point: Event | None = None
    ) -> list[ContainerError | None]:
        chunks = self.codec.decode_many(
            [StoredChunk(blob, item.start, 1, item.key) for item, blob in items]
        )
        if point is not None:
            point.wait()
        errors: list[ContainerError | None] = []
        for (item, _), chunk in zip(items, chunks, strict=True):
            if isinstance(chunk, ContainerError):
                errors.append(chunk)
            else:
                both = torch.cat((chunk.k, chunk.v), dim=-1)[0].flatten(1).contiguous()
                self._fill(item.block_ids, both.view(torch.uint8))
                errors.append(None)
        return errors

    def _copy(self, block_ids: Sequence[int]) -> torch.Tensor:
        """Pages of all layers, filled up with zeros: uint8 [L, heads * bytes per head]."""
        size, heads = self._group.state_bytes, self.codec.geometry.num_kv_heads
        device = self._pages[0].device
        shape = (len(self._pages), heads * _HEAD_BYTES)
        copied = torch.zeros(shape, dtype=torch.uint8, device=device)
        for page, table, out in zip(self._pages, self._tables, copied, strict=True):
            out[:size] = page[block_ids[table]].flatten().view(torch.uint8)
        return copied

    def _fill(self, block_ids: Sequence[int], pages: torch.Tensor) -> None:
        """Inverse of `_copy`."""
        size = self._group.state_bytes
        for page, table, data in zip(self._pages, self._tables, pages, strict=True):
            target = page[block_ids[table]]
            target.copy_(data[:size].view(target.dtype).view(target.shape))


@dataclass(frozen=True)
class _CopiedStates:
    items: Sequence[StoreItem]
    tensors: list[torch.Tensor]
