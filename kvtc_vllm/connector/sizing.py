"""How much memory beside the KV cache the worker may use, told at start-up."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.connector.cache_dtype import is_fp8
from kvtc_vllm.offload.geometry import CacheGeometry

logger = logging.getLogger("vllm.kvtc")

LEAST_STAGING_BYTES = 256 << 20
MOST_WORKSPACE_BYTES = 1 << 30
LEAST_WORKSPACE_BYTES = 64 << 20
STEPS_STAGED = 2
"""Full steps of prefill that staging holds: one that is being encoded, one that is computed."""
SHARE_OF_FREE = 4
"""Staging, encoding and decoding get one share each; the last is for CUDA graphs, captured later,
and for what vLLM's own estimate left out."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank. staging: KV that waits for the encoder. workspace: of one batch that is
    encoded, and again of one that is decoded. free: of the device at start; None for a CPU."""

    staging: int
    workspace: int
    free: int | None


def plan_memory(
    config: KVTCConfig, geometry: CacheGeometry, device: torch.device, step_tokens: int
) -> MemoryPlan:
    """step_tokens: most tokens that one step of the engine computes."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return divide(config.staging_capacity, step_tokens * _staged_token_bytes(geometry), free)


def divide(staging: int | None, step_bytes: int, free: int | None) -> MemoryPlan:
    """The plan for `free` bytes. staging: as configured, None for automatic."""
    workspace = MOST_WORKSPACE_BYTES
    wanted = max(STEPS_STAGED * step_bytes, LEAST_STAGING_BYTES)
    if free is not None:
        wanted = min(wanted, free // SHARE_OF_FREE)
        workspace = max(min(workspace, free // SHARE_OF_FREE), LEAST_WORKSPACE_BYTES)
    return MemoryPlan(wanted if staging is None else staging, workspace, free)


def log_plan(plan: MemoryPlan, geometry: CacheGeometry, resident: int, step_tokens: int) -> None:
    """One line with every size; a second where a full step would not fit."""
    assert plan.free is not None
    logger.info(
        "kvtc: device memory: bases %.1f MiB; staging up to %.1f MiB and workspace up to 2 x %.1f "
        "MiB of %.1f MiB that vLLM left free",
        *(n / 2**20 for n in (resident, plan.staging, plan.workspace, plan.free)),
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
