"""Which chunks the engine's own cache holds, in which blocks, and which of them it gives up.

A chunk is followed from the step that completes it until one of its blocks is handed out. Its
blocks are known again by their hashes: vLLM takes a block's hash away before the block may hold
anything else. So what is given up is told in the one moment in which it is certain that all of
its blocks still hold it: the step that will overwrite them is planned, and has not begun.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvtc_vllm.offload.messages import NO_ADAPTER, AdapterUse
from kvtc_vllm.offload.vllm_types import Block, BlockPool
from kvtc_vllm.tiers.keys import ChunkKey


@dataclass(frozen=True, eq=False)
class GpuChunk:
    """A chunk in the engine's own cache, computed by the model itself."""

    key: ChunkKey
    start: int
    """Token position of its first token."""
    block_ids: tuple[list[int], ...]
    """Its blocks by cache group."""
    hashes: tuple[tuple[int, bytes], ...]
    """Each block with the hash that it has as long as it holds this."""
    decoded: bool
    """It came out of the tier."""
    tenant: bytes = b""
    tokens: bytes = b""
    adapter: AdapterUse = NO_ADAPTER


class GpuChunks:
    """A `PoolListener`. Used by the scheduler's thread only."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._by_key: dict[ChunkKey, GpuChunk] = {}
        self._by_block: dict[int, GpuChunk] = {}
        self._given_up: list[GpuChunk] = []
        self._after_reset: list[GpuChunk] = []
        self._overwritten: list[GpuChunk] = []
        self._gone: list[ChunkKey] = []
        self._handed_out = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._by_key

    def follow(
        self,
        key: ChunkKey,
        start: int,
        block_ids: tuple[list[int], ...],
        decoded: bool,
        tenant: bytes = b"",
        tokens: bytes = b"",
    ) -> bool:
        """Follow a chunk that these blocks hold after this step.

        False if vLLM gives one of them no hash, so that nothing would tell when it is reused.
        """
        hashes = self._hashes(block_ids)
        if hashes is None:
            return False
        known = self._by_key.get(key)
        if known is not None and known.hashes == hashes:
            return True  # a request that found it in vLLM's cache, or was preempted
        if known is not None and self._holds(known):
            return True  # computed twice at the same time: one of them is enough
        for other in {id(c): c for b, _ in hashes if (c := self._by_block.get(b))}.values():
            self._overwrite(other)
        if key in self._by_key:
            self._overwrite(self._by_key[key])
        chunk = GpuChunk(key, start, block_ids, hashes, decoded, tenant, tokens)
        self._by_key[key] = chunk
        self._by_block.update((block, chunk) for block, _ in hashes)
        return True

    def next_to_go(self, blocks: int) -> Iterator[GpuChunk]:
        """Chunks with blocks among those that are handed out next, the first to go first."""
        seen: set[ChunkKey] = set()
        node = self._pool.free_block_queue.fake_free_list_head.next_free_block
        while node is not None and blocks > 0:
            chunk = self._by_block.get(node.block_id)
            if chunk is not None and chunk.key not in seen:
                seen.add(chunk.key)
                if self._holds(chunk):
                    yield chunk
                else:
                    self._overwrite(chunk)
            blocks -= 1
            node = node.next_free_block

    def take_handed_out(self) -> int:
        """Blocks that were handed out since the last call, whatever they held."""
        handed_out, self._handed_out = self._handed_out, 0
        return handed_out

    def take_given_up(self) -> list[GpuChunk]:
        """Chunks of which blocks were handed out since the last call.

        To be copied before the forward of the step that is being planned.
        """
        given_up, self._given_up = self._given_up, []
        return given_up

    def take_after_reset(self) -> list[GpuChunk]:
        """Chunks that were there when the prefix cache was reset; as in `take_given_up`."""
        left, self._after_reset = self._after_reset, []
        return left

    def take_overwritten(self) -> list[GpuChunk]:
        """Chunks that were followed and can't be copied any more."""
        overwritten, self._overwritten = self._overwritten, []
        return overwritten

    def take_gone(self) -> list[ChunkKey]:
        """Chunks that are not followed any more, for whatever reason, since the last call."""
        gone, self._gone = self._gone, []
        return gone

    def clear(self) -> None:
        """Follow nothing any more."""
        self._by_key.clear()
        self._by_block.clear()
        for found in (self._given_up, self._after_reset, self._overwritten):
            found.clear()
        self._gone.clear()

    # ------------------------------------------------------- told by vLLM's pool

    def handed_out(self, block: Block) -> None:
        self._handed_out += 1
        chunk = self._by_block.get(block.block_id)
        if chunk is None:
            return
        if self._holds(chunk):
            self._drop(chunk)
            self._given_up.append(chunk)
        else:
            self._overwrite(chunk)

    def disowned(self, block: Block) -> None:
        chunk = self._by_block.get(block.block_id)
        if chunk is not None:
            self._overwrite(chunk)

    def was_reset(self) -> None:
        self._after_reset += self._by_key.values()
        self._gone += self._by_key
        self._by_key.clear()
        self._by_block.clear()

    # ------------------------------------------------------------------- private

    def _hashes(self, block_ids: Sequence[list[int]]) -> tuple[tuple[int, bytes], ...] | None:
        found = []
        for number in (number for group in block_ids for number in group):
            block = self._pool.blocks[number]
            if block.is_null or block.block_hash is None:
                return None
            found.append((number, block.block_hash))
        return tuple(found)

    def _holds(self, chunk: GpuChunk) -> bool:
        blocks = self._pool.blocks
        return all(blocks[number].block_hash == expected for number, expected in chunk.hashes)

    def _overwrite(self, chunk: GpuChunk) -> None:
        self._drop(chunk)
        self._overwritten.append(chunk)

    def _drop(self, chunk: GpuChunk) -> None:
        del self._by_key[chunk.key]
        self._gone.append(chunk.key)
        for number, _ in chunk.hashes:
            if self._by_block.get(number) is chunk:
                del self._by_block[number]
