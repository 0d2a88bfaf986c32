"""vLLM's pool of KV blocks as far as prefix caching goes: the same order, the same calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class SimBlock:
    """vLLM's `KVCacheBlock`."""

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_cnt = 0
        self.block_hash: bytes | None = None
        self.is_null = False
        self.prev_free_block: SimBlock | None = None
        self.next_free_block: SimBlock | None = None


class _FreeBlocks:
    """vLLM's `FreeKVCacheBlockQueue`: what was free longest is handed out first."""

    def __init__(self, blocks: Sequence[SimBlock]) -> None:
        self.fake_free_list_head, self._tail = SimBlock(-1), SimBlock(-1)
        self._join(self.fake_free_list_head, self._tail)
        self.count = 0
        for block in blocks:
            self.append(block)

    def append(self, block: SimBlock) -> None:
        self._insert(block, self._tail)

    def prepend(self, blocks: Sequence[SimBlock]) -> None:
        for block in reversed(blocks):
            self._insert(block, self.fake_free_list_head.next_free_block)

    def remove(self, block: SimBlock) -> None:
        self._join(block.prev_free_block, block.next_free_block)
        block.prev_free_block = block.next_free_block = None
        self.count -= 1

    def pop(self) -> SimBlock:
        block = self.fake_free_list_head.next_free_block
        assert block is not None
        assert block is not self._tail
        self.remove(block)
        return block

    def _insert(self, block: SimBlock, before: SimBlock | None) -> None:
        assert before is not None
        self._join(before.prev_free_block, block)
        self._join(block, before)
        self.count += 1

    @staticmethod
    def _join(left: SimBlock | None, right: SimBlock | None) -> None:
        assert left is not None
        assert right is not None
        left.next_free_block, right.prev_free_block = right, left


class SimPool:
    """vLLM's `BlockPool`. Block 0 is the null block."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [SimBlock(number) for number in range(num_blocks)]
        self.blocks[0].is_null = True
        self.free_block_queue = _FreeBlocks(self.blocks[1:])
        self.metrics_collector: Any = None
        self.cached_block_hash_to_block: dict[bytes, dict[int, SimBlock]] = {}

    @property
    def free(self) -> int:
        """Blocks that no request holds."""
        return self.free_block_queue.count

    def find(self, block_hash: bytes) -> SimBlock | None:
        """A block with this hash."""
        blocks = self.cached_block_hash_to_block.get(block_hash)
        return next(iter(blocks.values())) if blocks else None

    def get_new_blocks(self, count: int) -> list[SimBlock]:
        """Hand out free blocks; there must be so many."""
        assert count <= self.free
        taken = [self.free_block_queue.pop() for _ in range(count)]
        for block in taken:
            self._forget(block)
            block.ref_cnt = 1
            if self.metrics_collector:
                self.metrics_collector.on_block_allocated(block)
        return taken

    def cache(self, block: SimBlock, block_hash: bytes) -> None:
        """Let a full block be found by its hash."""
        block.block_hash = block_hash
        self.cached_block_hash_to_block.setdefault(block_hash, {})[block.block_id] = block

    def touch(self, blocks: Iterable[SimBlock]) -> None:
        """Hold blocks that were found."""
        for block in blocks:
            if block.ref_cnt == 0:
                self.free_block_queue.remove(block)
            block.ref_cnt += 1
            if self.metrics_collector:
                self.metrics_collector.on_block_accessed(block)

    def free_blocks(self, blocks: Sequence[SimBlock]) -> None:
        """Let go of a request's blocks, its last first."""
        free = []
        for block in blocks:
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                free.append(block)
        self.free_block_queue.prepend([b for b in free if b.block_hash is None])
        for block in free:
            if block.block_hash is not None:
                self.free_block_queue.append(block)

    def evict_blocks(self, numbers: Iterable[int]) -> None:
        """Forget what these blocks hold; whoever holds them keeps them."""
        for number in numbers:
            self._forget(self.blocks[number])

    def reset_prefix_cache(self) -> bool:
        """Forget what all blocks hold; False while any is in use."""
        if self.free != len(self.blocks) - 1:
            return False
        self.cached_block_hash_to_block = {}
        for block in self.blocks:
            block.block_hash = None
        if self.metrics_collector:
            self.metrics_collector.reset()
        return True

    def _forget(self, block: SimBlock) -> None:
        if self.metrics_collector:
            self.metrics_collector.on_block_evicted(block)
        if block.block_hash is None:
            return
        blocks = self.cached_block_hash_to_block[block.block_hash]
        del blocks[block.block_id]
        if not blocks:
            del self.cached_block_hash_to_block[block.block_hash]
        block.block_hash = None
