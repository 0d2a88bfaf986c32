"""When chunks that may be stored are, as a configuration says."""

from __future__ import annotations

from collections.abc import Callable

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.auto_store import Auto
from kvtc_vllm.offload.on_evict import BlockReuse, OnEvict
from kvtc_vllm.offload.store_policy import Eager, StorePolicy
from kvtc_vllm.offload.tier_view import TierView


def make_timing(
    config: KVTCConfig,
    tier: TierView,
    reuse: BlockReuse,
    count: Callable[[str, int, str | None], None],
) -> StorePolicy:
    """The policy of `store_policy`. count: adds to a counter, with a label if it has any."""
    if config.store_policy == "eager":
        return Eager()
    on_evict = OnEvict(tier, reuse, config.store_horizon, count)
    return Auto(on_evict, tier) if config.store_policy == "auto" else on_evict
