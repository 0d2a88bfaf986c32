"""Which blocks of the engine's own cache may hold KV of weights that are gone.

After an update of weights vLLM keeps its prefix cache until somebody resets it, and requests
that run keep their blocks. What they compute on top of such blocks is neither the old model's
nor the new one's, and must not be stored under any name.
"""

from __future__ import annotations

from kvtc_vllm.offload.vllm_types import BlockPool


class Freshness:
    """Used by the scheduler's thread only. An adapter of None stands for the model itself."""

    def __init__(self) -> None:
        self._pool: BlockPool | None = None
        self._map: object = None
        self._first_step: int | None = None
        self._suspects: set[int | None] = set()
        self._unproven = False

    def bind(self, block_pool: BlockPool) -> None:
        """Watch vLLM's pool of blocks: its map of cached blocks is a new object after a reset."""
        self._pool = block_pool
        self._map = self._cached_blocks()

    def saw_reset(self) -> bool:
        """Whether vLLM's prefix cache was emptied since the last call."""
        cached = self._cached_blocks()
        if cached is self._map:
            return False
        self._map = cached
        self._first_step = None
        self._suspects.clear()
        self._unproven = False
        return True

    def planned(self, step: int, tokens: int) -> None:
        """Note a planned step that computes so many tokens."""
        if tokens and self._first_step is None:
            self._first_step = step

    def changed(self, step: int, adapter: int | None = None) -> None:
        """Suspect blocks of steps before this one, in which something else was found to compute."""
        if self._first_step is not None and self._first_step < step:
            self._suspects.add(adapter)

    def mixed(self) -> None:
        """Suspect all blocks until vLLM's prefix cache is emptied."""
        self._suspects.add(None)

    def doubt(self) -> None:
        """Suspect all blocks until `prove`: the weights may have changed."""
        self._unproven = True

    def prove(self) -> None:
        """End a doubt: the weights had not changed."""
        self._unproven = False

    def suspects(self, adapter: int | None) -> bool:
        """Whether cached blocks of requests with this adapter may be of other weights."""
        return self._unproven or None in self._suspects or adapter in self._suspects

    def _cached_blocks(self) -> object:
        return getattr(self._pool, "cached_block_hash_to_block", None)
