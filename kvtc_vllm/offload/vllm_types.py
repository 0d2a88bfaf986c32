"""What the scheduler's side reads of vLLM's objects, and nothing else.

vLLM's own classes fulfil these protocols in every supported release; the fakes of the tests do.
Attributes that some releases or requests lack are read by `getattr` where they are used:
`cache_salt`, `kv_transfer_params`, `lora_request`, `skip_reading_prefix_cache` and `status` of a
request.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Protocol


class Request(Protocol):
    """`vllm.v1.request.Request`."""

    @property
    def request_id(self) -> str: ...

    @property
    def num_tokens(self) -> int:
        """Prompt and confirmed output."""
        ...

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_computed_tokens(self) -> int: ...

    @property
    def num_preemptions(self) -> int: ...

    @property
    def all_token_ids(self) -> Sequence[int]:
        """Of prompt and confirmed output."""
        ...

    @property
    def block_hashes(self) -> Sequence[bytes]:
        """One per full block of confirmed tokens; each covers the whole prefix."""
        ...


class NewRequest(Protocol):
    """`vllm.v1.core.sched.output.NewRequestData`."""

    @property
    def req_id(self) -> str: ...

    @property
    def block_ids(self) -> Sequence[Sequence[int]]:
        """By cache group."""
        ...

    @property
    def num_computed_tokens(self) -> int: ...


class CachedRequests(Protocol):
    """`vllm.v1.core.sched.output.CachedRequestData`: running requests, in parallel lists."""

    @property
    def req_ids(self) -> Sequence[str]: ...

    @property
    def resumed_req_ids(self) -> AbstractSet[str]:
        """Those that come back from preemption, with whole new tables."""
        ...

    @property
    def new_block_ids(self) -> Sequence[Sequence[Sequence[int]] | None]: ...

    @property
    def num_computed_tokens(self) -> Sequence[int]: ...


class SchedulerOutput(Protocol):
    """`vllm.v1.core.sched.output.SchedulerOutput`: one step."""

    @property
    def scheduled_new_reqs(self) -> Sequence[NewRequest]: ...

    @property
    def scheduled_cached_reqs(self) -> CachedRequests: ...

    @property
    def num_scheduled_tokens(self) -> dict[str, int]: ...

    @property
    def finished_req_ids(self) -> AbstractSet[str]: ...


class Block(Protocol):
    """`vllm.v1.core.kv_cache_utils.KVCacheBlock`."""

    @property
    def block_id(self) -> int: ...

    @property
    def ref_cnt(self) -> int:
        """Requests that hold it; 0 if it is free."""
        ...

    @property
    def block_hash(self) -> bytes | None:
        """Of the prefix that it ends, with its cache group; None if it can't be found."""
        ...

    @property
    def is_null(self) -> bool:
        """Whether it stands for no block."""
        ...

    @property
    def prev_free_block(self) -> Block | None: ...

    @property
    def next_free_block(self) -> Block | None:
        """The one that is handed out after it; None if it is not free."""
        ...


class FreeBlocks(Protocol):
    """`vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue`: the next to be handed out first."""

    @property
    def fake_free_list_head(self) -> Block:
        """What is before the first; what is after the last has no next."""
        ...


class BlockPool(Protocol):
    """`vllm.v1.core.block_pool.BlockPool`."""

    metrics_collector: Any
    """Told of blocks that are handed out, evicted and used again, and of resets; None if nobody
    is."""

    @property
    def cached_block_hash_to_block(self) -> object:
        """Another object after every reset of the prefix cache."""
        ...

    @property
    def blocks(self) -> Sequence[Block]:
        """By number."""
        ...

    @property
    def free_block_queue(self) -> FreeBlocks: ...
