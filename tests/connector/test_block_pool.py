"""vLLM's own pool of blocks tells what it gives up. Also run on an older vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvtc_vllm.offload.gpu_records import GpuRecords
from kvtc_vllm.offload.pool_watch import watch_pool

pytestmark = pytest.mark.vllm

BLOCKS = 9
"""With the null block."""


class Inner:
    """A collector that was there before."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append(name)


@pytest.fixture
def pool() -> Any:
    from vllm.v1.core.block_pool import BlockPool

    return BlockPool(BLOCKS, enable_caching=True, hash_block_size=16)


def cached(pool: Any, count: int) -> list[int]:
    """Blocks of a request that has computed them."""
    blocks = pool.get_new_blocks(count)
    hashes = [bytes([n]) * 32 for n in range(count)]
    pool.cache_full_blocks(
        request=SimpleNamespace(block_hashes=hashes),
        blocks=blocks,
        num_cached_blocks=0,
        num_full_blocks=count,
        block_size=16,
        kv_cache_group_id=0,
    )
    return [block.block_id for block in blocks]


def test_what_is_handed_out_is_told_in_time(pool: Any) -> None:
    inner = Inner()
    pool.metrics_collector = inner
    chunks = GpuRecords(pool)
    assert watch_pool(pool, chunks)
    ids = cached(pool, 4)
    assert chunks.follow(b"first", 0, (ids[:2],), False)  # type: ignore[arg-type]
    assert chunks.follow(b"second", 32, (ids[2:],), False)  # type: ignore[arg-type]
    pool.free_blocks([pool.blocks[number] for number in reversed(ids)])
    assert [bytes(chunk.key) for chunk in chunks.next_to_go(BLOCKS)] == [b"second", b"first"]
    pool.get_new_blocks(5)  # four that were never used, and the last of the second chunk
    assert [bytes(chunk.key) for chunk in chunks.take_given_up()] == [b"second"]
    assert chunks.take_overwritten() == []
    assert b"first" in chunks
    assert chunks.take_handed_out() == 4 + 5
    assert {"on_block_allocated", "on_block_evicted"} <= set(inner.calls)


def test_evicted_hashes_and_resets_are_told_apart(pool: Any) -> None:
    chunks = GpuRecords(pool)
    watch_pool(pool, chunks)
    ids = cached(pool, 4)
    chunks.follow(b"first", 0, (ids[:2],), False)  # type: ignore[arg-type]
    chunks.follow(b"second", 32, (ids[2:],), False)  # type: ignore[arg-type]
    pool.evict_blocks({ids[0]})  # as after a load that failed
    assert [bytes(chunk.key) for chunk in chunks.take_overwritten()] == [b"first"]
    pool.free_blocks([pool.blocks[number] for number in reversed(ids)])
    pool.evict_blocks({ids[1]})
    assert pool.reset_prefix_cache()
    assert [bytes(chunk.key) for chunk in chunks.take_after_reset()] == [b"second"]
    assert chunks.take_given_up() == chunks.take_overwritten() == []
    assert chunks.take_gone() == [b"first", b"second"]


def test_blocks_without_a_hash_are_not_followed(pool: Any) -> None:
    chunks = GpuRecords(pool)
    watch_pool(pool, chunks)
    blocks = [block.block_id for block in pool.get_new_blocks(2)]
    assert not chunks.follow(b"first", 0, (blocks,), False)  # type: ignore[arg-type]
    assert not chunks.follow(b"null", 0, ([0],), False)  # type: ignore[arg-type]
    assert len(chunks) == 0
