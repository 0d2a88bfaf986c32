"""What a vLLM configuration says about how blocks of the KV cache are reused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtc_vllm.offload.geometry import CacheGeometry
from kvtc_vllm.offload.on_evict import BlockReuse

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def block_reuse(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, geometry: CacheGeometry
) -> BlockReuse:
    """How many blocks a step may take, and what happens to them before its forward."""
    batch = vllm_config.scheduler_config
    # Every request may begin a block more than its tokens fill.
    blocks = sum(
        len(group.tables)
        * (-(-batch.max_num_batched_tokens // group.block_size) + batch.max_num_seqs)
        for group in geometry.groups
    )
    return BlockReuse(
        step_blocks=blocks,
        # vLLM's second model runner clears such blocks before it calls the connector.
        zeroes=bool(getattr(kv_cache_config, "needs_kv_cache_zeroing", False)),
        sleeps=bool(vllm_config.model_config.enable_sleep_mode),
    )
