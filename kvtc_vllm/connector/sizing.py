"""How much memory beside the KV cache the worker may use, told at start-up."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.offload.geometry import CacheGeometry
from kvtc_vllm.vllm_cache.cache_dtype import is_fp8

logger = logging.getLogger("vllm.kvtc")

LEAST_STAGING_BYTES = 256 << 20
MOST_WORKSPACE_BYTES = 1 << 30
LEAST_WORKSPACE_BYTES = 64 << 20
STEPS_STAGED = 2
"""Full steps of prefill that staging holds: one that is being encoded, one that is computed."""
RESERVED_SHARE = 4
"""One part in so many of what is free stays so, for CUDA graphs, which are captured later, for
workspaces of cuBLAS and nvCOMP, and for what vLLM's own estimate left out."""
RESERVED_BYTES = 1 << 30
"""That much stays free if it is no more than half of what is."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank. staging: KV that waits for the encoder. workspace: of each of `threads`
    threads that encode or load. reserved: what stays free of `free`, which is measured when the
    bases are on the device; None for a CPU."""

    staging: int
    workspace: int
    threads: int
    reserved: int
    free: int | None


def plan_memory(
    config: KVTCConfig, geometry: CacheGeometry, device: torch.device, step_tokens: int
) -> MemoryPlan:
    """What is free now. step_tokens: most tokens that one step of the engine computes."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return divide(
        config.staging_capacity,
        step_tokens * _staged_token_bytes(geometry),
        free,
        config.encode_threads + config.load_threads,
    )


def divide(staging: int | None, step_bytes: int, free: int | None, threads: int = 2) -> MemoryPlan:
    """The plan for `free` bytes. staging: as configured, None for automatic."""
    workspace, reserved = MOST_WORKSPACE_BYTES, 0
    wanted = max(STEPS_STAGED * step_bytes, LEAST_STAGING_BYTES)
    if free is not None:
        reserved = max(free // RESERVED_SHARE, min(RESERVED_BYTES, free // 2))
        # Staging has a third of the rest, the threads share two.
        third = (free - reserved) // 3
        wanted = min(wanted, third)
        workspace = max(min(workspace, 2 * third // threads), LEAST_WORKSPACE_BYTES)
    return MemoryPlan(wanted if staging is None else staging, workspace, threads, reserved, free)


def log_plan(plan: MemoryPlan, geometry: CacheGeometry, resident: int, step_tokens: int) -> None:
    """One line with every size; a second where a full step would not fit."""
    assert plan.free is not None
    logger.info(
        "kvtc: device memory: bases %.1f MiB; of the other %.1f MiB that are free staging up to "
        "%.1f MiB, workspace up to %d x %.1f MiB, for CUDA graphs and libraries %.1f MiB",
        resident / 2**20,
        plan.free / 2**20,
        plan.staging / 2**20,
        plan.threads,
        plan.workspace / 2**20,
        plan.reserved / 2**20,
    )
    token_bytes = _staged_token_bytes(geometry)
    if plan.staging < step_tokens * token_bytes:
        logger.warning(
            "kvtc: staging holds %d tokens, a full step computes %d: stores beyond are dropped "
            "and counted; lower gpu_memory_utilization or max_num_batched_tokens",
            plan.staging // token_bytes,
            step_tokens,
        )


def _staged_token_bytes(geometry: CacheGeometry) -> int:
    """Rows of an fp8 cache are staged in 16 bits."""
    return sum(group.token_bytes * (2 if is_fp8(group.dtype) else 1) for group in geometry.groups)
