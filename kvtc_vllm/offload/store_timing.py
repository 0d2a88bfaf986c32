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
    at_once: int | None,
    loads: bool = True,
) -> StorePolicy:
    """The policy of `store_policy`. count: adds to a counter, with a label if it has any.

    at_once: chunks that `auto` may put off; None for any number. loads: whether this engine loads
    what it stores.
    """
    policy = chosen_policy(config, loads, len(geometry.groups))
    if policy == "eager":
        return Eager()
    on_evict = OnEvict(tier, reuse, config.store_horizon, count)
    return Auto(on_evict, tier, at_once) if policy == "auto" else on_evict


def chosen_policy(config: KVTCConfig, loads: bool, groups: int = 1) -> str:
    """`store_policy`, and where it is not given what nobody is surprised by.

    A disk is there for engines that start later, also after a crash, and for others that share it;
    what an engine that does not load stores is for others alone. None of them finds what only this
    engine's own cache has. Without them, `auto` finds more than `eager`. With several cache groups
    that was not measured in an engine under load.
    """
    if config.store_policy is not None:
        return config.store_policy
    if config.exclusive:
        return "auto"
    # What `degrade` gains was measured with `eager`.
    counted_on = config.disk_path is not None or not loads or config.degrade != "off"
    return "eager" if counted_on or groups > 1 else "auto"


def stored_at_once(
    config: KVTCConfig, geometry: CacheGeometry, bounds: Sequence[int], keepers: int
) -> int | None:
    """Chunks for whose stores there is room in one step, which may have to store all of them.

    None without a limit. bounds: by cache group, most bytes of a record on any rank. keepers: ranks
    that keep a part of it. Staging that
    plans itself holds two of the largest steps. Half of memory may be in use by loads and by stores
    before; but where there is no disk, what finds no room in memory would have left it anyway.
    """
    limits = []
    if config.disk_path is not None:
        limits.append(config.memory_capacity // keepers // sum(bounds) // 2)
    if config.staging_capacity is not None:
        limits.append(config.staging_capacity // (config.chunk_tokens * geometry.token_bytes))
    return min(limits, default=None)
