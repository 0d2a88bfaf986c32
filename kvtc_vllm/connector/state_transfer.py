"""States of recurrent layers (Mamba, gated delta nets, short convolutions) <-> blobs.

vLLM gives every layer of such a group one page per block: all of its states back to back, as
bytes. A record is the pages of one boundary, in byte planes (`state_bytes.py`). The raw codec keeps
them as a chunk of one token, whose keys and values are these bytes, deflated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.base import Blob, NewChunk, StoredChunk
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.raw import DeflatedRawCodec
from kvtc_vllm.codec.streams import Event
from kvtc_vllm.connector.state_bytes import StateBytes
from kvtc_vllm.offload.geometry import CacheGroup
from kvtc_vllm.offload.messages import LoadItem, StoreItem
from kvtc_vllm.offload.transfer import Staged
from kvtc_vllm.vllm_cache.compat import UnsupportedError

STATE_ELEMENT = torch.bfloat16
"""What the codec takes two bytes for."""
HEAD_SIZE = 128
"""Elements of K and of V per head of such a chunk; pages are filled up to whole heads."""
_HEAD_BYTES = 2 * HEAD_SIZE * STATE_ELEMENT.itemsize


def state_codec(group: CacheGroup, rounds: bool) -> DeflatedRawCodec:
    """What codes a boundary's pages, as so many heads of a token. rounds: see `StateBytes`."""
    layers = len(group.layer_names)
    heads = -(-StateBytes(group.state_parts, rounds).stored_bytes // _HEAD_BYTES)
    geometry = Geometry(layers, heads, HEAD_SIZE, HEAD_SIZE, ((0, layers),))
    return DeflatedRawCodec(geometry, STATE_ELEMENT)


class StateTransfer:
    """A `Transfer`, a record at a time.

    caches: layer name -> registered tensor, bytes [blocks, ..., C], C those of a layer's states.
    rounds: whether float32 is kept as bfloat16. Raises UnsupportedError for other tensors.
    """

    store_batch = load_batch = 1

    def __init__(
        self, caches: dict[str, torch.Tensor], group: CacheGroup, rounds: bool = False
    ) -> None:
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
        self._bytes = StateBytes(group.state_parts, rounds)
        self.codec = state_codec(group, rounds)

    def staged_bytes(self, blocks: int) -> int:
        return blocks // len(self._group.tables) * len(self._pages) * self._group.state_bytes

    def stage(self, items: Sequence[StoreItem]) -> Staged:
        return _CopiedStates(items, [self._copy(item.block_ids) for item in items])

    def encode(self, staged: _CopiedStates) -> list[bytes | CodecError]:
        geometry = self.codec.geometry
        shape = (1, geometry.num_layers, geometry.num_kv_heads, 2 * HEAD_SIZE)
        chunks = []
        for item, pages in zip(staged.items, staged.tensors, strict=True):
            stored = self._bytes.pack(pages)
            filled = stored.new_zeros((len(stored), geometry.num_kv_heads * _HEAD_BYTES))
            filled[:, : stored.shape[1]] = stored
            k, v = filled.view(STATE_ELEMENT).view(shape).split(HEAD_SIZE, dim=-1)
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
                stored = both.view(torch.uint8)[:, : self._bytes.stored_bytes]
                self._fill(item.block_ids, self._bytes.unpack(stored.contiguous()))
                errors.append(None)
        return errors

    def _copy(self, block_ids: Sequence[int]) -> torch.Tensor:
        """Pages of all layers: uint8 [L, bytes]."""
        pages = [
            page[block_ids[table]].flatten().view(torch.uint8)
            for page, table in zip(self._pages, self._tables, strict=True)
        ]
        return torch.stack(pages)

    def _fill(self, block_ids: Sequence[int], pages: torch.Tensor) -> None:
        """Inverse of `_copy`."""
        for page, table, data in zip(self._pages, self._tables, pages, strict=True):
            target = page[block_ids[table]]
            target.copy_(data.view(target.dtype).view(target.shape))


@dataclass(frozen=True)
class _CopiedStates:
    items: Sequence[StoreItem]
    tensors: list[torch.Tensor]
