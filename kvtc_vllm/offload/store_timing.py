"""When chunks that may be stored are, as a configuration says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.auto_store import Auto
from kvtc_vllm.offload.geometry import CacheGeometry
from kvtc_vllm.offload.on_evict import BlockReuse, OnEvict
from kvtc_vllm.offload.store_policy import Eager, StorePolicy
from kvtc_vllm.offload.tier_view import TierView


def make_timing(
    config: KVTCConfig,
    geometry: CacheGeometry,
    tier: TierView,
    reuse: BlockReuse,
    count: Callable[[str, int, str | None], None],
    at_once: int,
) -> StorePolicy:
    """The policy of `store_policy`. count: adds to a counter, with a label if it has any.

    at_once: chunks that one step can store, whatever it evicts from memory for them.
    """
    if config.store_policy == "eager":
        return Eager()
    on_evict = OnEvict(tier, reuse, config.store_horizon, count)
    return Auto(on_evict, tier, at_once) if config.store_policy == "auto" else on_evict


def stored_at_once(config: KVTCConfig, geometry: CacheGeometry, bounds: Sequence[int]) -> int:
    """Chunks for whose stores memory and staging have room in one step.

    bounds: by cache group, most bytes of a record on any rank. Half of memory may be in use by
    loads and by stores before; staging that plans itself holds two of the largest steps.
    """
    in_memory = config.memory_capacity // geometry.ranks // sum(bounds) // 2
    if config.staging_capacity is None:
        return in_memory
    staged = config.staging_capacity // (config.chunk_tokens * geometry.token_bytes)
    return min(in_memory, staged)
