"""Where vLLM's prefix cache tells what it evicts: the place of its residency metrics.

vLLM's pool of blocks calls a collector for every block that it hands out, before it forgets what
the block held, and at every reset. We take that place, and pass on to whatever was there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from kvtc_vllm.offload.vllm_types import Block, BlockPool


class PoolListener(Protocol):
    """Called by the scheduler's thread, from inside vLLM's pool."""

    def handed_out(self, block: Block) -> None:
        """A block goes to a request, which will overwrite it. Its hash still tells what it held."""
        ...

    def disowned(self, block: Block) -> None:
        """What a block holds can't be trusted any more, and it stays where it is."""
        ...

    def was_reset(self) -> None:
        """All blocks are free and have no hash any more. What they hold was not touched."""
        ...


def watch_pool(pool: BlockPool, listener: PoolListener) -> bool:
    """Have the listener told of what `pool` does; False if this pool can't tell."""
    if not hasattr(pool, "metrics_collector"):
        return False
    pool.metrics_collector = _Collector(listener, pool.metrics_collector)
    return True


class _Collector:
    """vLLM's `KVCacheMetricsCollector`, as the pool calls it; the rest is the inner one's."""

    def __init__(self, listener: PoolListener, inner: Any) -> None:
        self._listener = listener
        self._inner = inner

    def on_block_evicted(self, block: Block) -> None:
        # A block that is handed out was taken from the free ones, and is nobody's yet. One whose
        # load failed is in use, or among the free ones.
        free = block.prev_free_block is not None or block.next_free_block is not None
        if block.ref_cnt or free:
            self._listener.disowned(block)
        else:
            self._listener.handed_out(block)
        self._pass_on("on_block_evicted", block)

    def on_block_allocated(self, block: Block) -> None:
        self._pass_on("on_block_allocated", block)

    def on_block_accessed(self, block: Block) -> None:
        self._pass_on("on_block_accessed", block)

    def reset(self) -> None:
        self._listener.was_reset()
        self._pass_on("reset")

    def __getattr__(self, name: str) -> Any:
        inner: Callable[..., Any] = getattr(self._inner, name)
        return inner

    def _pass_on(self, name: str, *arguments: Block) -> None:
        if self._inner is not None:
            getattr(self._inner, name)(*arguments)
