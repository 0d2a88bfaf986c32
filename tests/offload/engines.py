"""Engines in small for store policies: the real scheduler's side over a pool of few blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.store_policy.engine import BLOCK, SimEngine, SimRequest
from kvtc_vllm.config import load_config
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup
from kvtc_vllm.offload.on_evict import BlockReuse
from kvtc_vllm.offload.scheduler import KVTCScheduler

CHUNK = 4 * BLOCK
RECORD_BYTES = 1000
GROUP = CacheGroup(("layers.0",), BLOCK, 1, 8, 8, torch.bfloat16)


def scheduler_side(chunks: int = 1 << 16, reuse: BlockReuse | None = None, **extra: Any) -> Any:
    """The scheduler's side with room for so many chunks. extra: keys of the configuration."""
    config = load_config(
        {
            "store_policy": "on_evict",
            "chunk_tokens": CHUNK,
            "recent_window": 0,
            "load_gate": False,
            "memory_bytes": chunks * RECORD_BYTES,
            **extra,
        }
    )
    return KVTCScheduler(
        config, CacheGeometry((GROUP,), 1), [RECORD_BYTES], prompt_only=False, reuse=reuse
    )


def engine(blocks: int, side: Any = None, **options: Any) -> SimEngine:
    """An engine with so many blocks besides the null block."""
    return SimEngine(side or scheduler_side(), blocks + 1, RECORD_BYTES, **options)


def hashes(path: Sequence[object], blocks: int) -> list[bytes]:
    """Block hashes of a prefix: equal paths are equal prefixes as far as they go.

    path: one part per chunk, the last of which goes on.
    """
    found = []
    for number in range(blocks):
        parts = [path[min(n, len(path) - 1)] for n in range(number * BLOCK // CHUNK + 1)]
        found.append(f"{parts}:{number}".encode())
    return found


def request(name: str, path: Sequence[object], blocks: int, answer: int = 0) -> SimRequest:
    """A prompt of whole blocks, and an answer of tokens."""
    own = hashes(path, blocks + answer // BLOCK + 1)
    return SimRequest(name, own, blocks * BLOCK, answer)


def counters(side: Any) -> dict[str, float]:
    """Counts since the last call."""
    stats = side.take_stats()
    return {} if stats is None else stats.data
