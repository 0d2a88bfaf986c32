"""Which records the engine's own cache holds, in which blocks, and which of them it gives up.

A record is followed from the step that completes it until one of its blocks is handed out; those
of one chunk go at different times, as the engine gives back what a window has left. Its blocks
are known again by their hashes: vLLM takes a block's hash away before the block may hold anything
else. So what is given up is told in the one moment in which it is certain that all of its blocks
still hold it: the step that will overwrite them is planned, and has not begun.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvtc_vllm.offload.messages import NO_ADAPTER, AdapterUse
from kvtc_vllm.offload.vllm_types import Block, BlockPool
from kvtc_vllm.tiers.keys import ChunkKey, RecordKey, record_key


@dataclass(frozen=True, eq=False)
class GpuRecord:
    """A record in the engine's own cache, computed by the model itself."""

    record: RecordKey
    key: ChunkKey
    """Of its chunk."""
    start: int
    """Token position of the chunk's first token."""
    block_ids: tuple[list[int], ...]
    """Its blocks by cache group; none but in its own."""
    hashes: tuple[tuple[int, bytes], ...]
    """Each block with the hash that it has as long as it holds this."""
    decoded: bool
    """It came out of the tier."""
    tenant: bytes = b""
    tokens: bytes = b""
    adapter: AdapterUse = NO_ADAPTER


class GpuRecords:
    """A `PoolListener`. Used by the scheduler's thread only."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._by_key: dict[RecordKey, GpuRecord] = {}
        self._by_block: dict[int, GpuRecord] = {}
        self._given_up: list[GpuRecord] = []
        self._after_reset: list[GpuRecord] = []
        self._overwritten: list[GpuRecord] = []
        self._gone: list[RecordKey] = []
        self._handed_out = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: RecordKey) -> bool:
        return key in self._by_key

    def follow(
        self,
        key: ChunkKey,
        start: int,
        block_ids: tuple[list[int], ...],
        decoded: bool,
        tenant: bytes = b"",
        tokens: bytes = b"",
        group: int = 0,
    ) -> bool:
        """Follow a cache group's record of a chunk, which these blocks hold after this step.

        False if vLLM gives one of them no hash, so that nothing would tell when it is reused.
        """
        record = record_key(key, group)
        hashes = self._hashes(block_ids)
        if hashes is None:
            return False
        known = self._by_key.get(record)
        if known is not None and known.hashes == hashes:
            return True  # a request that found it in vLLM's cache, or was preempted
        if known is not None and self._holds(known):
            return True  # computed twice at the same time: one of them is enough
        for other in {id(c): c for b, _ in hashes if (c := self._by_block.get(b))}.values():
            self._overwrite(other)
        if record in self._by_key:
            self._overwrite(self._by_key[record])
        found = GpuRecord(record, key, start, block_ids, hashes, decoded, tenant, tokens)
        self._by_key[record] = found
        self._by_block.update((block, found) for block, _ in hashes)
        return True

    def next_to_go(self, blocks: int) -> Iterator[GpuRecord]:
        """Records with blocks among those that are handed out next, the first to go first."""
        seen: set[RecordKey] = set()
        node = self._pool.free_block_queue.fake_free_list_head.next_free_block
        while node is not None and blocks > 0:
            found = self._by_block.get(node.block_id)
            if found is not None and found.record not in seen:
                seen.add(found.record)
                if self._holds(found):
                    yield found
                else:
                    self._overwrite(found)
            blocks -= 1
            node = node.next_free_block

    def take_handed_out(self) -> int:
        """Blocks that were handed out since the last call, whatever they held."""
        handed_out, self._handed_out = self._handed_out, 0
        return handed_out

    def take_given_up(self) -> list[GpuRecord]:
        """Records of which blocks were handed out since the last call.

        To be copied before the forward of the step that is being planned.
        """
        given_up, self._given_up = self._given_up, []
        return given_up

    def take_after_reset(self) -> list[GpuRecord]:
        """Records that were there when the prefix cache was reset; as in `take_given_up`."""
        left, self._after_reset = self._after_reset, []
        return left

    def take_overwritten(self) -> list[GpuRecord]:
        """Records that were followed and can't be copied any more."""
        overwritten, self._overwritten = self._overwritten, []
        return overwritten

    def take_gone(self) -> list[RecordKey]:
        """Records that are not followed any more, for whatever reason, since the last call."""
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
        found = self._by_block.get(block.block_id)
        if found is None:
            return
        if self._holds(found):
            self._drop(found)
            self._given_up.append(found)
        else:
            self._overwrite(found)

    def disowned(self, block: Block) -> None:
        found = self._by_block.get(block.block_id)
        if found is not None:
            self._overwrite(found)

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

    def _holds(self, record: GpuRecord) -> bool:
        blocks = self._pool.blocks
        return all(blocks[number].block_hash == expected for number, expected in record.hashes)

    def _overwrite(self, record: GpuRecord) -> None:
        self._drop(record)
        self._overwritten.append(record)

    def _drop(self, record: GpuRecord) -> None:
        del self._by_key[record.record]
        self._gone.append(record.record)
        for number, _ in record.hashes:
            if self._by_block.get(number) is record:
                del self._by_block[number]
